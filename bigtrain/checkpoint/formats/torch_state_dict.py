"""Weights as `torch.save(model.state_dict())` leaves them: `pytorch_model.bin` and its like."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bigtrain.checkpoint.boxes import Box, box_extents
from bigtrain.checkpoint.index import WEIGHT, Extents, TensorEntry, TensorIndex
from bigtrain.checkpoint.inert import Inert, brief
from bigtrain.checkpoint.json_object import indexed_files
from bigtrain.checkpoint.torch_file import Archive, TensorRef, tensors_within
from bigtrain.errors import CheckpointError

WEIGHTS = ("pytorch_model.bin", "pytorch_model_fsdp.bin")
WEIGHTS_INDEX = "pytorch_model.bin.index.json"
_NESTED = ("state_dict", "model", "module")
_STATE = re.compile(r"(^|_)(opt|optim|optimizers?|(lr_?)?sched(ulers?)?|scaler|callbacks)(_|$)")
"""Keys beside a state dict under which training keeps its own state, and no weights."""
_ELEMENTS = re.compile(r"^torch\._|multiarray\._reconstruct$")
"""What pickles call to make tensors of other kinds, and numpy's arrays."""


def state_dict_files(directory: Path) -> list[Path]:
    """The files of a state dict in a directory; empty when there are none."""
    whole = [directory / name for name in WEIGHTS if (directory / name).is_file()]
    index = directory / WEIGHTS_INDEX
    return whole[:1] or (list(indexed_files(index)) if index.is_file() else [])


def read_state_dict(paths: Sequence[Path]) -> TensorIndex:
    """The tensors of these files, all of kind weight.

    CheckpointError where what holds tensors, or is one of another kind, lies among them.
    """
    entries: dict[tuple[str, str], TensorEntry] = {}
    for number, path in enumerate(paths):
        state_dict, _ = _unwrapped(Archive(path).read())
        for name, stored in _tensors(str(path), state_dict).items():
            if (name, WEIGHT) in entries:
                raise CheckpointError(f"{path}: {name} is also in another file")
            entries[name, WEIGHT] = _entry(name, stored, file=number)
    return TensorIndex(files=tuple(paths), entries=entries)


def read_other_sets(
    paths: Sequence[Path], *, chosen: str
) -> Mapping[str, Mapping[str, TensorEntry]]:
    """What lies in these files beside the state dict that is read, and has weights too: averages.

    By the key of each; CheckpointError where the `chosen` one doesn't hold all of them by name.
    """
    sets: dict[str, dict[str, TensorEntry]] = {}
    for number, path in enumerate(paths):
        _, beside = _unwrapped(Archive(path).read())
        for key, value in beside:
            tensors = {} if _is_state(key, value) else dict(tensors_within(value))
            if any(each.shape and "float" in each.dtype.name for each in tensors.values()):
                if key == chosen:
                    tensors = _tensors(f"{path}: {key}", _unwrapped(value)[0])
                of_file = {name: _entry(name, each, file=number) for name, each in tensors.items()}
                sets.setdefault(key, {}).update(of_file)
    return sets


def _unwrapped(saved: Any) -> tuple[Any, Sequence[tuple[str, Any]]]:
    """The state dict in what was saved, and what lies beside it there."""
    beside: list[tuple[str, Any]] = []
    for key in _NESTED:
        if isinstance(saved, Mapping) and isinstance(saved.get(key), Mapping):
            beside += [(_told(name), value) for name, value in saved.items() if name != key]
            saved = saved[key]
    return saved, beside


def _tensors(where: str, saved: Any) -> dict[str, TensorRef]:
    found = dict(saved) if isinstance(saved, Mapping) else {}
    for name, value in found.items():
        if fault := _fault(name, value):
            raise CheckpointError(f"{where}: {fault}")
    tensors = {name: value for name, value in found.items() if isinstance(value, TensorRef)}
    if not tensors:
        raise CheckpointError(f"{where}: holds no tensors by name; not a model's weights")
    return tensors


def _fault(name: Any, value: Any) -> str | None:
    """Why a state dict can't be written without losing this value of it; None where it can."""
    if isinstance(value, TensorRef):
        no_text = f"{brief(name)} can't be a tensor's name: it is no text"
        return None if isinstance(name, str) else no_text
    if _is_state(_told(name), value):
        return None
    way, _ = next(tensors_within(value), (None, None))
    if isinstance(value, Inert) and (way is not None or _ELEMENTS.search(value.qualified)):
        return (
            f"{_told(name)} is no dense tensor: it is made by {value.qualified}, which can't be "
            "read; save it dense (to_dense(), dequantize(), torch.from_numpy()), or leave it out"
        )
    if way is not None:
        return (
            f"{_told(name)} holds tensors and is none ({_told(name)}.{way}); save the model's "
            "state_dict() alone, or under `model`"
        )
    return None


def _is_state(key: str, value: Any) -> bool:
    has_groups = isinstance(value, Mapping) and "param_groups" in value
    return has_groups or _STATE.search(key) is not None


def _told(name: Any) -> str:
    return name if isinstance(name, str) else brief(name)


def _entry(name: str, stored: TensorRef, *, file: int) -> TensorEntry:
    extents = box_extents(
        stored.shape,
        Box((0,) * len(stored.shape), stored.shape),
        file=file,
        offset=stored.offset,
        itemsize=stored.dtype.itemsize,
        file_strides=stored.strides,
    )
    return TensorEntry(
        name=name, kind=WEIGHT, shape=stored.shape, dtype=stored.dtype, extents=Extents(extents)
    )
