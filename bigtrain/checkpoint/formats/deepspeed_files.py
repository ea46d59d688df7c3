"""The files of one step of a DeepSpeed engine: found, read, or refused with the reason."""

from __future__ import annotations

import os
import re
import struct
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from bigtrain.checkpoint.inert import Inert, brief, class_name
from bigtrain.checkpoint.json_object import counts
from bigtrain.checkpoint.torch_file import Archive, TensorRef
from bigtrain.errors import CheckpointError

_OPTIM = re.compile(r"^(?:bf16_|fp16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt$")
_SHARDED_MODEL = re.compile(r"^zero_pp_rank_(\d+)_mp_rank_(\d+)_model_states\.pt$")
_WHOLE_MODEL = re.compile(r"^mp_rank_(\d+)_model_states\.pt$")
_EXPERTS = re.compile(
    r"^(expp_rank_\d+_mp_rank_\d+_optim|(layer_\d+_)?expert_\d+_mp_rank_\d+_model)"
)
_PIPELINE = re.compile(r"^layer_\d+-model_\d+-model_states\.pt$")
_SHOWN = 8
_STEP_FORMATS = {"float32": "<f", "float64": "<d", "int64": "<q", "int32": "<i"}


@dataclass(frozen=True, kw_only=True)
class Saved:
    """What the files of one step say, with references for tensors."""

    directory: Path
    stage: int
    """0: no ZeRO, the module is whole."""
    world_size: int
    model: Sequence[Mapping[str, Any]]
    """Of rank 0; of every rank where frozen parameters are sharded."""
    optim: Sequence[Mapping[str, Any]]
    """Of every rank: its `optimizer_state_dict`."""
    param_shapes: Sequence[Mapping[str, tuple[int, ...]]]
    """Per group, or sub-group at stage 3: names in the order in which they are stored."""

    def listed(self, key: str) -> dict[str, Any]:
        """What the model states of rank 0 list by name; empty where they don't."""
        return _by_name(self.directory, key, self.model[0].get(key) or {})

    def module_tensors(self, *, known: Container[str]) -> dict[str, TensorRef]:
        """The tensors of the module, among which there are placeholders for those that are `known`
        from elsewhere. What else it holds may be left out, but no weight and no buffer."""
        module = self.listed("module")
        buffers = set(self.model[0].get("buffer_names") or ())
        if buffers and not module:
            raise CheckpointError(
                f"{self.directory}: its model states name buffers, but no module; save it again"
            )
        for name, value in module.items():
            is_needed = name in buffers or (not _is_extra_state(name) and _holds_tensors(value))
            if is_needed and name not in known and not isinstance(value, TensorRef):
                raise CheckpointError(
                    f"{self.directory}: {name} is no plain tensor ({class_name(value)}), and can't "
                    "be read; save the module with it as one, or without it"
                )
        return {name: value for name, value in module.items() if isinstance(value, TensorRef)}


def is_deepspeed(directory: Path) -> bool:
    """Whether it is the directory of one step of a DeepSpeed engine."""
    return any(
        pattern.match(name)
        for name in _names(directory)
        for pattern in (_OPTIM, _WHOLE_MODEL, _SHARDED_MODEL)
    )


def latest_step(directory: Path) -> str | None:
    """The step's directory that `latest` names; None where there is no such file, or it leads
    elsewhere."""
    try:
        name = (directory / "latest").read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return None
    is_beside = name not in ("", "..") and Path(name).name == name and "\0" not in name
    return name if is_beside else None


def read_saved(directory: Path) -> Saved:
    """Read all files that matter; CheckpointError says what is missing or can't be used."""
    names = _names(directory)
    _refuse_by_name(directory, names)
    optim_files = _by_rank(directory, names, _OPTIM)
    sharded = _by_rank(directory, names, _SHARDED_MODEL)
    whole = [name for name in names if _WHOLE_MODEL.match(name)]
    if not sharded and not whole:
        raise CheckpointError(f"{directory}: has no file of model states, so no names and shapes")
    if not optim_files:
        return _without_zero(directory, whole)
    optim = [_optimizer_state(path) for path in _in_order(directory, optim_files)]
    stage = _stage(directory, optim[0])
    _check_ranks(directory, optim_files, optim)
    _check_one_step(directory, optim)
    first = _structure(_first_model_file(directory, stage, whole, sharded))
    _refuse_by_content(directory, first)
    model = [first]
    if stage == 3 and first.get("frozen_param_shapes"):
        _check_present(directory, sharded, len(optim), "model states")
        model += [_structure(sharded[rank]) for rank in range(1, len(optim))]
    return Saved(
        directory=directory,
        stage=stage,
        world_size=len(optim),
        model=model,
        optim=optim,
        param_shapes=_param_shapes(directory, first),
    )


def _first_model_file(
    directory: Path, stage: int, whole: Sequence[str], sharded: Mapping[int, Path]
) -> Path:
    if stage == 3:
        _check_present(directory, sharded, max(sharded, default=0) + 1, "model states")
        return sharded[0]
    if not whole:
        raise CheckpointError(f"{directory}: mp_rank_00_model_states.pt is missing")
    return directory / whole[0]


def _names(directory: Path) -> list[str]:
    try:
        return sorted(path.name for path in directory.iterdir())
    except OSError:
        return []


def _without_zero(directory: Path, whole: Sequence[str]) -> Saved:
    """A module that no rank holds only a part of."""
    if not whole:
        raise CheckpointError(
            f"{directory}: none of the ranks' *_optim_states.pt is there, and at ZeRO stage 3 only "
            "they hold the weights"
        )
    model = _structure(directory / whole[0])
    _refuse_by_content(directory, model)
    if model.get("param_shapes") is not None:
        raise CheckpointError(
            f"{directory}: none of the ranks' *_optim_states.pt is there, which hold the fp32 "
            "weights of ZeRO"
        )
    return Saved(
        directory=directory, stage=0, world_size=1, model=[model], optim=[], param_shapes=[]
    )


def _refuse_by_name(directory: Path, names: Sequence[str]) -> None:
    if experts := [name for name in names if _EXPERTS.match(name)]:
        raise CheckpointError(
            f"{directory}: holds mixture-of-experts parameters that are divided over groups of "
            f"ranks ({experts[0]}); these can't be read yet: use DeepSpeed's ds_to_universal"
        )
    if layers := [name for name in names if _PIPELINE.match(name)]:
        raise CheckpointError(
            f"{directory}: was written by DeepSpeed's pipeline engine ({layers[0]}), which can't "
            "be read yet"
        )
    parallel = {
        match[match.lastindex or 1]
        for name in names
        for pattern in (_OPTIM, _SHARDED_MODEL, _WHOLE_MODEL)
        if (match := pattern.match(name))
    }
    if len(parallel) > 1:
        _refuse_tensor_parallel(directory, len(parallel))


def _refuse_tensor_parallel(directory: Path, size: int) -> None:
    raise CheckpointError(
        f"{directory}: its parameters are also divided by tensor parallelism over {size} ranks, "
        "which can't be read yet: use DeepSpeed's ds_to_universal"
    )


def _refuse_by_content(directory: Path, model: Mapping[str, Any]) -> None:
    size = model.get("mp_world_size")
    if isinstance(size, int) and size > 1:
        _refuse_tensor_parallel(directory, size)
    for key in ("ds_autoep_layers", "autoep_layers", "num_experts"):
        if model.get(key):
            raise CheckpointError(
                f"{directory}: holds mixture-of-experts parameters ({key}), which can't be read "
                "yet: use DeepSpeed's ds_to_universal"
            )


def _by_rank(directory: Path, names: Sequence[str], pattern: re.Pattern[str]) -> dict[int, Path]:
    found: dict[int, Path] = {}
    for name in names:
        if match := pattern.match(name):
            rank = int(match[1])
            if rank in found:
                raise CheckpointError(
                    f"{directory}: has two files of rank {rank}, {found[rank].name} and {name}; "
                    "one is of an older save: remove it"
                )
            found[rank] = directory / name
    return found


def _in_order(directory: Path, files: Mapping[int, Path]) -> list[Path]:
    _check_present(directory, files, max(files) + 1, "optimizer states")
    return [files[rank] for rank in sorted(files)]


def _check_present(directory: Path, files: Mapping[int, Path], count: int, what: str) -> None:
    number = count - sum(rank < count for rank in files)
    if number:  # which may be any that a file says: too many to list
        missing = (rank for rank in range(count) if rank not in files)
        raise CheckpointError(
            f"{directory}: the {what} of {_ranks(missing, number)} of {count} are missing; copy "
            "the files of all nodes into one directory"
        )


def _ranks(ranks: Iterable[int], number: int) -> str:
    shown = ", ".join(map(str, islice(ranks, _SHOWN)))
    more = f" and {number - _SHOWN} more" if number > _SHOWN else ""
    return f"rank {shown}" if number == 1 else f"ranks {shown}{more}"


def _structure(path: Path) -> Mapping[str, Any]:
    found = Archive(path).read()
    if not isinstance(found, dict):
        raise CheckpointError(f"{path}: not a file of DeepSpeed's (it holds no dict)")
    return found


def _optimizer_state(path: Path) -> Mapping[str, Any]:
    state = _structure(path).get("optimizer_state_dict")
    if not isinstance(state, dict) or "partition_count" not in state:
        raise CheckpointError(f"{path}: not a rank's part of a ZeRO optimizer")
    return state


def _stage(directory: Path, state: Mapping[str, Any]) -> int:
    stage = state.get("zero_stage")
    if isinstance(stage, Inert) and stage.args:
        stage = stage.args[0]
    if stage is None and "single_partition_of_fp32_groups" in state:
        return 1  # BF16_Optimizer, which names no stage
    if stage not in (1, 2, 3):
        raise CheckpointError(f"{directory}: ZeRO stage {brief(stage)} is not known here")
    return int(stage)


def _check_ranks(
    directory: Path, files: Mapping[int, Path], optim: Sequence[Mapping[str, Any]]
) -> None:
    """As many files as the ranks say there were, and no groups with partitions of their own."""
    if any(state.get("ds_zero_partition_groups") for state in optim):
        raise CheckpointError(
            f"{directory}: its groups are divided over different sets of ranks (mixture of "
            "experts), which can't be read yet"
        )
    found = {count for state in optim for count in _partition_counts(directory, state)}
    if len(found) > 1:
        raise CheckpointError(
            f"{directory}: its groups are divided over {sorted(found)} ranks; files of several "
            "saves, or mixture of experts, which can't be read yet"
        )
    count = found.pop()
    _check_present(directory, files, count, "optimizer states")
    if len(files) > count:
        extra = sorted(files)[count:]
        raise CheckpointError(
            f"{directory}: was saved by {count} ranks, but holds files of "
            f"{_ranks(extra, len(extra))} too, left by another save; remove them"
        )


def _partition_counts(directory: Path, state: Mapping[str, Any]) -> Sequence[int]:
    """Over how many ranks each group is divided."""
    stored = state["partition_count"]
    found = stored if isinstance(stored, list) else [stored]
    if not found or any(type(count) is not int or count < 1 for count in found):
        raise CheckpointError(
            f"{directory}: its groups are divided over {brief(stored)} ranks, which is no number "
            "of them (partition_count); its files are damaged"
        )
    return found


def _check_one_step(directory: Path, optim: Sequence[Mapping[str, Any]]) -> None:
    """Refuse a directory over which a second save was cut short: its ranks are of two steps."""
    steps = [_step(state) for state in optim]
    if len({step for step in steps if step is not None}) > 1:
        raise CheckpointError(
            f"{directory}: mixes several steps (by rank: {', '.join(map(str, steps[:_SHOWN]))}"
            f"{', …' if steps[_SHOWN:] else ''}); a save over it was cut short"
        )


def _step(state: Mapping[str, Any]) -> float | None:
    """How many steps the rank's optimizer counts; None where it doesn't count them."""
    inner = state.get("base_optimizer_state", state.get("optimizer_state_dict"))
    first: Mapping[str, Any] = {}
    group: Mapping[str, Any] = {"step": state.get("base_optimizer_state_step")}
    if isinstance(inner, dict):
        first = next(iter(inner["state"].values()), {})
        group = next(iter(inner["param_groups"]), {})
    elif inner:
        first = inner[0]
    step = first.get("step", group.get("step"))
    if isinstance(step, TensorRef) and not step.shape and step.dtype.name in _STEP_FORMATS:
        with step.file.open("rb", buffering=0) as file:
            stored = os.pread(file.fileno(), step.dtype.itemsize, step.offset)
        return float(struct.unpack(_STEP_FORMATS[step.dtype.name], stored)[0])
    return step if isinstance(step, int) else None


def _param_shapes(directory: Path, model: Mapping[str, Any]) -> list[dict[str, tuple[int, ...]]]:
    groups = model.get("param_shapes")
    if not isinstance(groups, list):
        raise CheckpointError(
            f"{directory}: its model states don't say which parameters there are (param_shapes)"
        )
    listed = [_by_name(directory, "param_shapes", group) for group in groups]
    return [{name: counts(list(shape)) for name, shape in group.items()} for group in listed]


def _by_name(directory: Path, key: str, found: Any) -> dict[str, Any]:
    if not isinstance(found, dict):
        raise CheckpointError(
            f"{directory}: its model states have {brief(found)} where tensors are listed by name "
            f"({key}); they are damaged"
        )
    for name in found:
        if not isinstance(name, str):
            raise CheckpointError(
                f"{directory}: its model states list a tensor under {brief(name)}, which is no "
                f"text ({key}); give it a name, and save again"
            )
    return found


def _is_extra_state(name: str) -> bool:
    """Whether it is what a module keeps beside its weights and buffers (`get_extra_state`)."""
    return name.rpartition(".")[2] == "_extra_state"


def _holds_tensors(value: Any) -> bool:
    """Whether a value is or may hold tensors, of whatever type."""
    pending, seen = [value], set[int]()
    while pending:
        each = pending.pop()
        if isinstance(each, (TensorRef, Inert)):
            return True
        if id(each) not in seen and isinstance(each, (dict, list, tuple, set, frozenset)):
            seen.add(id(each))
            pending += each.values() if isinstance(each, dict) else each
    return False
