"""Weights as `torch.save(model.state_dict())` leaves them: `pytorch_model.bin` and its like."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from bigtrain.checkpoint.boxes import Box, box_extents
from bigtrain.checkpoint.index import WEIGHT, Extents, TensorEntry, TensorIndex
from bigtrain.checkpoint.json_object import indexed_files
from bigtrain.checkpoint.torch_file import Archive, TensorRef
from bigtrain.errors import CheckpointError

WEIGHTS = ("pytorch_model.bin", "pytorch_model_fsdp.bin")
WEIGHTS_INDEX = "pytorch_model.bin.index.json"
_NESTED = ("state_dict", "model", "module")


def state_dict_files(directory: Path) -> list[Path]:
    """The files of a state dict in a directory; empty when there are none."""
    whole = [directory / name for name in WEIGHTS if (directory / name).is_file()]
    index = directory / WEIGHTS_INDEX
    return whole[:1] or (list(indexed_files(index)) if index.is_file() else [])


def read_state_dict(paths: Sequence[Path]) -> TensorIndex:
    """The tensors of these files, all of kind weight."""
    entries: dict[tuple[str, str], TensorEntry] = {}
    for number, path in enumerate(paths):
        for name, stored in _tensors(path, Archive(path).read()):
            if (name, WEIGHT) in entries:
                raise CheckpointError(f"{path}: {name} is also in another file")
            entries[name, WEIGHT] = _entry(name, stored, file=number)
    return TensorIndex(files=tuple(paths), entries=entries)


def _tensors(path: Path, saved: Any) -> Iterator[tuple[str, TensorRef]]:
    for key in _NESTED:
        if isinstance(saved, Mapping) and isinstance(saved.get(key), Mapping):
            saved = saved[key]
    found = dict(saved) if isinstance(saved, Mapping) else {}
    tensors = {name: value for name, value in found.items() if isinstance(value, TensorRef)}
    if not tensors:
        raise CheckpointError(f"{path}: holds no tensors by name; not a model's weights")
    yield from tensors.items()


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
