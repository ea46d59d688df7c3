"""A model for others to load, put where another may be: a reader never finds half of either.

    <directory>/.export-<id>/…     being written
    <directory>/model.safetensors  renamed from there, once all of it is on the disk

The directory holds more than the model (checkpoints, logs), so it can't be renamed as a whole.
Each file replaces its predecessor at once; of several weight files the index comes last and its
predecessor goes first, so that the old one's shards are never loaded beside the new one's.
"""

from __future__ import annotations

import os
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bigtrain.checkpoint.staging import (
    free_bytes,
    is_out_of_space,
    readable_size,
    sync_directory,
)
from bigtrain.errors import CheckpointError

_PREFIX = ".export-"
_WEIGHTS = re.compile(r"^(model|pytorch_model)(-\d+-of-\d+)?\.(safetensors|bin)(\.index\.json)?$")
_INDEX = ".index.json"


@contextmanager
def exporting(directory: Path, *, nbytes: int) -> Iterator[Path]:
    """A fresh directory to write a model of `nbytes` into; its files then move to `directory`.

    One process alone. CheckpointError where the disk is full; what was there before is whole then.
    """
    directory.mkdir(parents=True, exist_ok=True)
    for leftover in directory.glob(f"{_PREFIX}*"):
        shutil.rmtree(leftover, ignore_errors=True)
    staging = directory / f"{_PREFIX}{uuid.uuid4().hex}"
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
    """Weights first, indexes last: before, the directory's old index stands for nothing new."""
    for name in names:
        if name.endswith(_INDEX):
            (directory / name).unlink(missing_ok=True)
    for name in sorted(names, key=_rank):
        target = directory / name
        target.parent.mkdir(parents=True, exist_ok=True)
        (staging / name).replace(target)
    if any(_WEIGHTS.match(name) for name in names):
        for path in list(directory.iterdir()):
            if _WEIGHTS.match(path.name) and path.name not in names:
                path.unlink()  # it would be loaded in place of what is new
    sync_directory(directory)


def _rank(name: str) -> tuple[int, str]:
    if name.endswith(_INDEX):
        return 2, name
    return (0 if _WEIGHTS.match(name) else 1), name
