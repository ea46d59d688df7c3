"""What a directory is, as far as checkpoints go, and what it holds.

`open_source` takes whatever a user has: a checkpoint of bigtrain's, one of DeepSpeed's, torch's,
accelerate's, Lightning's or transformers', or a run's directory with several of them. No tensor is
loaded and no pickle is run.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from bigtrain.checkpoint.formats.dcp import is_dcp, read_dcp_sets
from bigtrain.checkpoint.formats.dcp_keys import MODEL as MODEL
from bigtrain.checkpoint.formats.deepspeed import read_deepspeed
from bigtrain.checkpoint.formats.deepspeed_files import is_deepspeed, latest_step
from bigtrain.checkpoint.formats.torch_state_dict import state_dict_files
from bigtrain.checkpoint.formats.transformers_dir import weight_files
from bigtrain.checkpoint.formats.whole_weights import read_whole_weights
from bigtrain.checkpoint.index import BUFFER, WEIGHT, TensorEntry, TensorIndex, merge
from bigtrain.checkpoint.manifest import MANIFEST
from bigtrain.checkpoint.records import (
    check_torch_files,
    item_records,
    read_dcp_items,
    torch_file_records,
)
from bigtrain.checkpoint.verify import verify_checkpoint
from bigtrain.checkpoint.witness import Record, RecordSource, no_records
from bigtrain.errors import CheckpointError

logger = logging.getLogger(__name__)

_FSDP = ("pytorch_model_fsdp_0", "fsdp_model", "distributed_checkpoint")
_STEP = re.compile(r"(\d+)(?:\.ckpt)?$")
_RUN_STEP = re.compile(r"(checkpoint|global_step|step)[-_]?\d+$")
_UNFINISHED = re.compile(r"\.(tmp|old|gone)-|\.partial$")
_CLOCKS_S = 2.0
"""How far the clocks of a run's machines may be apart, and a file system's times be rounded."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """One step of some run: what it holds, and where."""

    path: Path
    """The directory of the step; all that belongs to it lies there."""
    kind: str
    """In words: `DeepSpeed ZeRO-3 of 2 ranks`."""
    index: TensorIndex
    step: int | None = None
    sets: Mapping[str, Mapping[str, TensorEntry]]
    """Weights and buffers by name; `model`, and more where the run kept averages."""
    aliases: Mapping[str, str] = field(default_factory=dict)
    """Name of a tied parameter → the name under which it is stored."""
    find_record: RecordSource = no_records
    check_all: Callable[[], int] = lambda: 0
    """Checks every checksum that a foreign source stores; how many there were."""
    is_own: bool = False
    """Whether bigtrain wrote and committed it."""
    has_plain_names: bool = False
    """Whether no engine or wrapper can have put a prefix before all names."""
    passed_over: tuple[tuple[Path, str], ...] = ()
    """Newer ones that could not be used, and why."""

    def names_in(self, path: Path, start: int, stop: int) -> list[str]:
        """The weights of which elements lie in these bytes."""
        file = self.index.files.index(path)
        return [
            entry.name
            for entry in self.index.entries.values()
            if entry.kind in (WEIGHT, BUFFER)
            and any(e.file == file and start <= e.offset < stop for e in entry.extents)
        ]


def with_base(adapter: Source, base: Source) -> tuple[Source, Mapping[str, TensorEntry]]:
    """One source of both, and the weights of `base` in it."""
    index = merge([adapter.index, base.index])
    of_base = set(base.index.files)

    def find_record(path: Path, offset: int) -> Record | None:
        return (base if path in of_base else adapter).find_record(path, offset)

    both = replace(
        adapter,
        kind=f"{adapter.kind}, on {base.path}",
        index=index,
        find_record=find_record,
        check_all=lambda: adapter.check_all() + base.check_all(),
    )
    weights = {name: index.entry(e.name, e.kind) for name, e in base.sets[MODEL].items()}
    return both, weights


def open_source(path: Path, *, step: int | None = None, trust_times: bool = False) -> Source:
    """The checkpoint at `path`; of several below it, that of `step`, else the newest that holds."""
    if not path.is_dir():
        what = "is a file, not a checkpoint's directory" if path.exists() else "does not exist"
        raise CheckpointError(f"{path} {what}")
    candidates = list(_candidates(path))
    if step is not None:
        candidates = [each for each in candidates if each.step == step]
    if not candidates:
        raise CheckpointError(_nothing(path, step))
    passed_over: list[tuple[Path, str]] = []
    for position, candidate in enumerate(candidates):
        try:
            return replace(candidate.open(trust_times), passed_over=tuple(passed_over))
        except CheckpointError as fault:
            if position + 1 == len(candidates):
                raise
            logger.warning("passing over %s: %s", candidate.path, fault)
            passed_over.append((candidate.path, str(fault)))
    raise AssertionError("unreachable")


@dataclass(frozen=True, kw_only=True)
class _Candidate:
    path: Path
    step: int | None
    read: Callable[[Path, bool], Source]

    def open(self, trust_times: bool) -> Source:
        source = self.read(self.path, trust_times)
        source.index.check_tiling()
        return source


def _candidates(path: Path) -> Iterator[_Candidate]:
    """The checkpoints at or below `path`, the newest first."""
    read = _reader(path)
    here = None if read is None else _Candidate(path=path, step=_step_of(path), read=read)
    # A run's directory may hold its last model beside its steps.
    if here is not None and (read is not _read_plain or not _has_steps(path)):
        yield here
        return
    below = sorted(_directories(path))
    named = latest_step(path)
    found = [
        candidate
        for child in below
        if not _UNFINISHED.search(child.name)
        for candidate in _candidates_below(child)
    ]
    yield from sorted(
        found, key=lambda each: (each.path.name != named, -(each.step or 0), each.path.name)
    )
    if here is not None:
        yield here


def _directories(path: Path) -> list[Path]:
    """Those that can be looked into: not a disk's `lost+found`."""
    return [
        child for child in path.iterdir() if child.is_dir() and os.access(child, os.R_OK | os.X_OK)
    ]


def _has_steps(path: Path) -> bool:
    steps = [child for child in _directories(path) if _RUN_STEP.match(child.name)]
    return any(True for step in steps for _ in _candidates_below(step))


def _candidates_below(child: Path) -> Iterator[_Candidate]:
    """Those of a directory with its own name's step, where they have none themselves."""
    grandchildren = _directories(child)
    if _reader(child) is None and not any(map(_reader, grandchildren)):
        return
    for candidate in _candidates(child):
        step = candidate.step if candidate.step is not None else _step_of(child)
        yield _Candidate(path=candidate.path, step=step, read=candidate.read)


def _reader(path: Path) -> Callable[[Path, bool], Source] | None:
    """What reads `path` itself; None when it is no checkpoint."""
    if (path / MANIFEST).is_file():
        return _read_own
    if is_deepspeed(path):
        return _read_zero
    if is_dcp(path):
        return _read_dcp
    if any(is_dcp(path / name) for name in _FSDP):
        return _read_fsdp
    if latest_step(path) and is_deepspeed(path / (latest_step(path) or "")):
        return None  # weights beside it are a copy in lower precision
    if _safetensors(path) or _state_dicts(path):
        return _read_plain
    return None


def _safetensors(path: Path) -> list[Path]:
    return weight_files(path) or [p for p in [path / "adapter_model.safetensors"] if p.is_file()]


def _state_dicts(path: Path) -> list[Path]:
    return state_dict_files(path) or [p for p in [path / "adapter_model.bin"] if p.is_file()]


def _read_own(path: Path, _trust_times: bool) -> Source:
    verified = verify_checkpoint(path, lenient=True)
    manifest = verified.manifest
    away = [why for file, why in verified.elsewhere.items() if file in verified.index.files]
    if away:
        raise CheckpointError(
            f"{path} is one node's part of a checkpoint (save_on_each_node), and {len(away)} files "
            "lie on other nodes' disks; copy the directories of all nodes into one first"
        )
    return Source(
        path=path,
        kind=f"bigtrain {manifest.engine} of {manifest.world_size} ranks",
        index=verified.index,
        step=manifest.progress.step,
        sets={MODEL: _weights(verified.index)},
        find_record=item_records(path, verified.parts),
        is_own=True,
        has_plain_names=True,
    )


def _read_zero(path: Path, _trust_times: bool) -> Source:
    found = read_deepspeed(path)
    stage = f"ZeRO-{found.stage}" if found.stage else "without ZeRO"
    return Source(
        path=path,
        kind=f"DeepSpeed {stage} of {found.world_size} ranks",
        index=found.index,
        step=found.step,
        sets={MODEL: _weights(found.index)},
        aliases=found.aliases,
        find_record=torch_file_records(),
        check_all=lambda: check_torch_files(found.index.files),
    )


def _read_fsdp(path: Path, trust_times: bool) -> Source:
    inner = next(path / name for name in _FSDP if is_dcp(path / name))
    return _read_dcp(inner, trust_times, root=path)


def _read_dcp(path: Path, trust_times: bool, *, root: Path | None = None) -> Source:
    items = read_dcp_items(path)
    items.check_files()
    if not trust_times:
        items.check_times(tolerance_s=_CLOCKS_S)
    index, sets = read_dcp_sets(path)
    named = f" ({', '.join(sets)})" if set(sets) - {MODEL} else ""
    return Source(
        path=root or path,
        kind=f"torch DCP of {len(items.items)} files{named}",
        index=index,
        step=_step_of(root or path),
        sets=sets,
        find_record=items.records(),
        check_all=items.check_all,
    )


def _read_plain(path: Path, _trust_times: bool) -> Source:
    safetensors, state_dicts = _safetensors(path), _state_dicts(path)
    index = read_whole_weights(path, safetensors=safetensors, state_dicts=state_dicts)
    return Source(
        path=path,
        kind="safetensors" if safetensors else "torch state dict",
        index=index,
        step=_step_of(path),
        sets={MODEL: _weights(index)},
        find_record=no_records if safetensors else torch_file_records(),
        check_all=lambda: 0 if safetensors else check_torch_files(state_dicts),
        has_plain_names=(path / "config.json").is_file(),
    )


def _weights(index: TensorIndex) -> dict[str, TensorEntry]:
    return {
        name: entry for (name, kind), entry in index.entries.items() if kind in (WEIGHT, BUFFER)
    }


def _step_of(path: Path) -> int | None:
    match = _STEP.search(path.name)
    return int(match[1]) if match else None


def _nothing(path: Path, step: int | None) -> str:
    steps = sorted({each.step for each in _candidates(path) if each.step is not None})
    if step is not None and steps:
        return f"{path} has no checkpoint of step {step}; it has {', '.join(map(str, steps))}"
    names = [child.name for child in sorted(path.iterdir())][:8]
    return (
        f"{path} holds no checkpoint that is known here (bigtrain, DeepSpeed ZeRO, torch DCP, "
        f"FSDP, safetensors); in it: {', '.join(names) or 'nothing'}"
    )
