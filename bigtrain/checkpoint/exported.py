"""A model for others to load, put where another may be: a reader never finds half of either.

    <directory>/.export-<id>/…     being written
    <directory>/model.safetensors  renamed from there, once all of it is on the disk

The directory holds more than the model (checkpoints, logs), so it can't be renamed as a whole.
Each file replaces its predecessor at once. Where shards have the names of older ones they first get
others: then the index, of which there is always one with all of its shards, tells which are meant.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import xxhash

from bigtrain.checkpoint import processes
from bigtrain.checkpoint.staging import (
    free_bytes,
    is_out_of_space,
    readable_size,
    sync_directory,
)
from bigtrain.errors import CheckpointError

_PREFIX = ".export-"
_OWNED = re.compile(
    r"^\.export-(?P<machine>[0-9a-f]{16})-(?P<pid>\d+)-(?P<started>\d*)-[0-9a-f]{32}$"
)
_WEIGHTS = re.compile(
    r"^(model|pytorch_model)(-\d+-of-\d+)?(\.[0-9a-f]{8})?\.(safetensors|bin)(\.index\.json)?$"
)
_INDEX = ".index.json"
_ABANDONED_S = 24 * 3600.0
"""Of another machine's, whose processes can't be looked up from here."""


@contextmanager
def exporting(directory: Path, *, nbytes: int) -> Iterator[Path]:
    """A fresh directory to write a model of `nbytes` into; its files then move to `directory`.

    One process alone. CheckpointError where the disk is full; what was there before is whole then.
    """
    directory.mkdir(parents=True, exist_ok=True)
    for leftover in directory.glob(f"{_PREFIX}*"):
        if _is_abandoned(leftover):
            shutil.rmtree(leftover, ignore_errors=True)
    staging = directory / _fresh_name()
    try:
        if nbytes > free_bytes(directory):
            raise CheckpointError(_disk_full(directory, nbytes))
        staging.mkdir()
        yield staging
        names = _sync_files(staging)
        _move(names, staging, directory)
    except CheckpointError:
        raise
    except Exception as fault:
        if is_out_of_space(fault, directory, needed=nbytes):
            raise CheckpointError(_disk_full(directory, nbytes)) from fault
        raise
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _disk_full(directory: Path, needed: int) -> str:
    free = free_bytes(directory)
    return (
        f"no space for the model in {directory}: it takes {readable_size(needed)}, "
        f"{readable_size(free)} are free; free some, and save again. What was there is untouched"
    )


def _sync_files(staging: Path) -> list[str]:
    names = []
    for path in sorted(staging.rglob("*")):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
            names.append(path.relative_to(staging).as_posix())
    return names


def _move(names: list[str], staging: Path, directory: Path) -> None:
    """Whenever this is cut short, the directory holds the old model or the new one."""
    weights = [name for name in names if _WEIGHTS.match(name) and not name.endswith(_INDEX)]
    index = next((name for name in names if _WEIGHTS.match(name) and name.endswith(_INDEX)), None)
    for name in sorted(set(names) - {*weights, index}):
        _place(staging / name, directory / name)
    stay = set(names)
    if index is not None and any((directory / name).exists() for name in weights):
        stay = _replace_shards(weights, index, staging, directory)
    else:
        for name in [*weights, *([index] if index else [])]:
            _place(staging / name, directory / name)
    sync_directory(directory)
    if weights:
        for path in list(directory.iterdir()):
            if _WEIGHTS.match(path.name) and path.name not in stay:
                path.unlink()  # it would be loaded in place of what is new
    sync_directory(directory)


def _replace_shards(weights: list[str], index: str, staging: Path, directory: Path) -> set[str]:
    """New shards in place of older ones of the same names; what then belongs to the model."""
    tag = uuid.uuid4().hex[:8]
    passing = {name: Path(name).with_suffix(f".{tag}{Path(name).suffix}").name for name in weights}
    for name, other in passing.items():
        _place(staging / name, directory / other)
    _place(_with_other_names(staging / index, passing), directory / index)
    sync_directory(directory)
    try:
        for name, other in passing.items():
            os.link(directory / other, staging / name)
            _place(staging / name, directory / name)
    except OSError:  # a file system without links: they keep the names that they have
        return {index, *passing.values()}
    sync_directory(directory)
    _place(staging / index, directory / index)
    return {index, *weights}


def _with_other_names(index: Path, names: Mapping[str, str]) -> Path:
    """A copy of an index, on the disk, of shards that are called otherwise."""
    content = json.loads(index.read_text(encoding="utf-8"))
    content["weight_map"] = {k: names.get(v, v) for k, v in content["weight_map"].items()}
    copy = index.with_name(f"{index.name}.passing")
    with copy.open("w", encoding="utf-8") as file:
        json.dump(content, file)
        file.flush()
        os.fsync(file.fileno())
    return copy


def _place(staged: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    staged.replace(target)


def _fresh_name() -> str:
    pid = os.getpid()
    return f"{_PREFIX}{_tag()}-{pid}-{processes.started(pid)}-{uuid.uuid4().hex}"


def _tag() -> str:
    return xxhash.xxh3_64_hexdigest(processes.machine().encode())


def _is_abandoned(staging: Path) -> bool:
    """Whether nobody writes there any more."""
    owner = _OWNED.match(staging.name)
    if owner is not None and owner["machine"] == _tag():
        return processes.started(int(owner["pid"])) != owner["started"]
    try:
        touched = max(path.stat().st_mtime for path in (staging, *staging.rglob("*")))
    except OSError:
        return False
    return time.time() - touched > _ABANDONED_S
