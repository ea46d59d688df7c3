"""Training states that others wrote: transformers' Trainer, accelerate, a bare DeepSpeed engine.

What is alike in all of them is a directory of one step that holds, in a format of its own each,
weights and optimizer, and beside them small files: scheduler, random state, `trainer_state.json`.
Here it is only found out which is where; no tensor is loaded and no pickle is run.

    transformers                        accelerate              bare
    checkpoint-N/global_stepN/*.pt      …/pytorch_model/*.pt    global_stepN/*.pt    DeepSpeed
    …/pytorch_model_fsdp_0, optimizer_0                         any DCP directory    FSDP
    …/model.safetensors, optimizer.pt   …/optimizer.bin                              DDP, alone
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bigtrain.checkpoint.find import lost_manifest, require_checkpoint
from bigtrain.checkpoint.formats.dcp import is_dcp, read_dcp
from bigtrain.checkpoint.formats.deepspeed import read_deepspeed
from bigtrain.checkpoint.formats.deepspeed_files import is_deepspeed, latest_step
from bigtrain.checkpoint.formats.torch_state_dict import state_dict_files
from bigtrain.checkpoint.formats.transformers_dir import Names, read_optimizer, weight_files
from bigtrain.checkpoint.formats.whole_weights import read_whole_weights
from bigtrain.checkpoint.index import TensorIndex, merge
from bigtrain.checkpoint.manifest import MANIFEST, Progress
from bigtrain.checkpoint.records import read_dcp_items, torch_file_records
from bigtrain.checkpoint.torch_file import Archive
from bigtrain.checkpoint.witness import RecordSource, no_records
from bigtrain.errors import CheckpointError

_MODEL_DCP = ("pytorch_model_fsdp_0", "pytorch_model_0")
_MODEL_OF_FSDP = "pytorch_model_fsdp.bin"
_OPTIMIZER_DCP = ("optimizer_0",)
_OPTIMIZER_FILES = ("optimizer.pt", "optimizer.bin")
_SCHEDULER_FILES = ("scheduler.pt", "scheduler.bin")
_TRAINER_STATE = "trainer_state.json"
_STEP = re.compile(r"(?:checkpoint-|step[-_]?)(\d+)$")
"""Of names that count steps: accelerate's `checkpoint_3` counts saves, and much else ends so."""


@dataclass(frozen=True, kw_only=True)
class ForeignCheckpoint:
    """One step of a run that bigtrain did not write."""

    path: Path
    engine: str
    """In words: `DeepSpeed ZeRO-3`."""
    world_size: int
    """Ranks that wrote it, as far as that can be told."""
    index: TensorIndex
    progress: Progress
    aliases: Mapping[str, str] = field(default_factory=dict)
    """Name of a tied parameter → the name under which it is stored."""
    opaque: frozenset[str] = frozenset()
    """Kinds of optimizer state that can't be divided by parameter."""
    find_record: RecordSource = no_records
    """The checksum that was stored with the bytes at a place of a file."""

    @property
    def scheduler(self) -> Path | None:
        """The scheduler's own file."""
        return _first(self.path, _SCHEDULER_FILES)

    def random_state(self, rank: int) -> Path | None:
        """The file with the random state of one rank."""
        names = [f"rng_state_{rank}.pth", f"random_states_{rank}.pkl"]
        return _first(self.path, ["rng_state.pth", *names] if self.world_size == 1 else names)


def is_foreign(path: Path) -> bool:
    """Whether there is a step with an optimizer's state in the directory, in a known format, and
    it is not bigtrain's without its manifest."""
    if not path.is_dir() or lost_manifest(path):
        return False
    return (
        _zero_directory(path) is not None
        or is_dcp(path)
        or _first(path, _OPTIMIZER_FILES) is not None
        or _dcp_in(path, _OPTIMIZER_DCP) is not None
    )


def has_been_split(path: Path) -> bool:
    """Whether somebody has turned our one weights file into transformers' several: the manifest
    no longer describes them, and the checkpoint is read as transformers'."""
    has_index = (path / "model.safetensors.index.json").is_file()
    return has_index and not (path / "model.safetensors").is_file()


def require_training_state(path: Path) -> Path:
    """`path`, where training can go on from it, whoever wrote it; else an error that says what is
    there instead."""
    if not (path / MANIFEST).is_file() and is_foreign(path):
        return path
    return require_checkpoint(path)


def read_foreign(path: Path, *, names: Names | None = None) -> ForeignCheckpoint:
    """The step in `path`; CheckpointError says what is missing or can't be read.

    `names` of the trained parameters, group by group, in the order of the optimizer that is to go
    on: some formats number them and don't name them.
    """
    zero = _zero_directory(path)
    if zero is not None:
        found = _read_zero(path, zero)
    elif is_dcp(path):
        found = _read_dcp(path, [path])
    elif _dcp_in(path, _MODEL_DCP) is not None:
        found = _read_dcp(
            path, [p for n in (_MODEL_DCP, _OPTIMIZER_DCP) if (p := _dcp_in(path, n))]
        )
    elif weight_files(path) or state_dict_files(path):
        found = _read_files(path, names)
    else:
        raise CheckpointError(
            f"{path}: no training state in it that is known here (of transformers' Trainer, "
            "accelerate, DeepSpeed, torch's distributed checkpoints)"
        )
    found.index.check_tiling()
    return found


def _read_zero(path: Path, directory: Path) -> ForeignCheckpoint:
    found = read_deepspeed(directory)
    return ForeignCheckpoint(
        path=path,
        engine=f"DeepSpeed ZeRO-{found.stage}" if found.stage else "DeepSpeed without ZeRO",
        world_size=found.world_size,
        index=found.index,
        progress=_progress(path, step=found.step),
        aliases=found.aliases,
        opaque=found.opaque,
        find_record=torch_file_records(),
    )


def _read_dcp(path: Path, directories: Sequence[Path]) -> ForeignCheckpoint:
    tables = [read_dcp_items(directory) for directory in directories]
    for table in tables:
        table.check_files()
    sources = [table.records() for table in tables]
    by_file = {
        file: find for table, find in zip(tables, sources, strict=True) for file in table.items
    }
    index = merge([read_dcp(directory) for directory in directories])
    if index.param_groups is None and any(k not in ("weight", "buffer") for _, k in index.entries):
        raise CheckpointError(f"{path}: has an optimizer's state without its groups")
    return ForeignCheckpoint(
        path=path,
        engine="FSDP (torch DCP)",
        world_size=_rank_files(path) or max(len(table.items) for table in tables),
        index=index,
        progress=_progress(path),
        find_record=lambda file, offset: by_file[file](file, offset),
    )


def _read_files(path: Path, names: Names | None) -> ForeignCheckpoint:
    safetensors = weight_files(path)
    indexes = [
        read_whole_weights(path, safetensors=safetensors, state_dicts=state_dict_files(path))
    ]
    optimizer = _first(path, _OPTIMIZER_FILES)
    if optimizer is not None:
        indexes.append(read_optimizer(optimizer, names=names))
    world_size = _rank_files(path) or 1
    index = merge(indexes)
    zips = torch_file_records()
    plain = set(safetensors)
    return ForeignCheckpoint(
        path=path,
        engine=_engine_of_files(path, world_size),
        world_size=world_size,
        index=index,
        progress=_progress(path),
        find_record=lambda file, offset: None if file in plain else zips(file, offset),
    )


def _engine_of_files(path: Path, world_size: int) -> str:
    if (path / _MODEL_OF_FSDP).is_file():
        return "FSDP (full state dict)"
    return "one process" if world_size == 1 else "DDP"


def _progress(path: Path, *, step: int | None = None) -> Progress:
    state = _trainer_state(path)
    found = state.get("global_step", step)
    if found is None:
        match = _STEP.search(path.name)
        found = int(match[1]) if match else 0
    return Progress(
        step=int(found),
        epoch=float(state.get("epoch") or 0.0),
        tokens_seen=int(state.get("num_input_tokens_seen") or 0),
    )


def _trainer_state(path: Path) -> Mapping[str, Any]:
    file = path / _TRAINER_STATE
    if not file.is_file():
        return {}
    try:
        state = json.loads(file.read_bytes())
    except ValueError as fault:
        raise CheckpointError(f"{file}: no JSON ({fault}); the file is damaged") from fault
    return state if isinstance(state, dict) else {}


def _zero_directory(path: Path) -> Path | None:
    """The directory of DeepSpeed's files: this one, what `latest` names in it, or accelerate's."""
    if is_deepspeed(path):
        return path
    for base in (path, path / "pytorch_model"):
        named = latest_step(base)
        for candidate in (base, *([base / named] if named else [])):
            if candidate.is_dir() and is_deepspeed(candidate):
                return candidate
    # transformers writes `latest` beside its step's directory, but a copy of one step may lack it.
    steps = [child for child in _directories(path) if re.fullmatch(r"global_step\d+", child.name)]
    return steps[0] if len(steps) == 1 and is_deepspeed(steps[0]) else None


def _directories(path: Path) -> list[Path]:
    return sorted(child for child in path.iterdir() if child.is_dir()) if path.is_dir() else []


def _dcp_in(path: Path, names: Sequence[str]) -> Path | None:
    return next((path / name for name in names if is_dcp(path / name)), None)


def _first(path: Path, names: Sequence[str]) -> Path | None:
    return next((path / name for name in names if (path / name).is_file()), None)


def _rank_files(path: Path) -> int:
    """How many ranks left their random state."""
    patterns = ("rng_state_*.pth", "random_states_*.pkl")
    return max(len(list(path.glob(pattern))) for pattern in patterns)


def numbers_as_names(path: Path) -> list[list[str]]:
    """Names for the parameters of an optimizer that only numbers them: `parameter 0`, …"""
    optimizer = _first(path, _OPTIMIZER_FILES)
    if optimizer is None:
        return []
    groups = Archive(optimizer).read()["param_groups"]
    return [[f"parameter {number}" for number in group["params"]] for group in groups]


def steps_of_groups(index: TensorIndex) -> dict[tuple[str, str], float]:
    """The step of each parameter whose optimizer counts it only in its group."""
    steps: dict[tuple[str, str], float] = {}
    for group in index.param_groups or ():
        step = group.get("step")
        if not isinstance(step, (int, float)):
            continue
        for name in group["params"]:
            kinds = index.by_name.get(name, ())
            if "step" not in kinds and any(kind not in ("weight", "buffer") for kind in kinds):
                steps[name, "step"] = float(step)
    return steps
