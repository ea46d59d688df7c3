"""Checkpoint directories as `transformers.Trainer` lays them out.

`model.safetensors` (or shards with an index) holds the weights by name, `optimizer.pt` torch's
optimizer state by number: its groups say which number is which parameter, where they hold
`param_names`, as those that bigtrain writes do. Else whoever reads them has to say it: the order
of its own optimizer's groups, which transformers makes in the same way.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from bigtrain.checkpoint.boxes import Box, box_extents
from bigtrain.checkpoint.index import Extents, TensorEntry, TensorIndex
from bigtrain.checkpoint.inert import brief
from bigtrain.checkpoint.json_object import indexed_files
from bigtrain.checkpoint.torch_file import Archive, TensorRef
from bigtrain.errors import CheckpointError

WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"
OPTIMIZER = "optimizer.pt"

Names: TypeAlias = Sequence[Sequence[str]]


def weight_files(directory: Path) -> list[Path]:
    """The files that hold the weights; empty when there are none. As for `from_pretrained`, an
    index counts only where no whole file lies beside it."""
    if (directory / WEIGHTS).is_file():
        return [directory / WEIGHTS]
    index = directory / WEIGHTS_INDEX
    return list(indexed_files(index)) if index.is_file() else []


def read_optimizer(path: Path, *, names: Names | None = None) -> TensorIndex:
    """The state of a torch optimizer that `torch.save` wrote, by its parameters' names.

    `names` of the parameters, group by group, are needed where the file doesn't hold any.
    """
    saved = Archive(path).read()
    try:
        state, groups = saved["state"], _named_groups(path, saved["param_groups"], names)
        known = {
            number: name
            for stored, group in zip(saved["param_groups"], groups, strict=True)
            for number, name in zip(stored["params"], group["params"], strict=True)
        }
        tensors = [
            (known[number], kind, value)
            for number, kinds in state.items()
            for kind, value in kinds.items()
            if isinstance(value, TensorRef)
        ]
    except (KeyError, TypeError, AttributeError, ValueError) as fault:
        raise CheckpointError(
            f"{path}: not the state of a torch optimizer ({brief(fault)})"
        ) from fault
    entries = {(name, kind): _entry(name, kind, value) for name, kind, value in tensors}
    return TensorIndex(files=(path,), entries=entries, param_groups=groups)


def _named_groups(
    path: Path, groups: Sequence[Mapping[str, Any]], names: Names | None
) -> tuple[Mapping[str, Any], ...]:
    found: list[Mapping[str, Any]] = []
    # Groups without parameters don't count: some engines drop them.
    given = iter([group for group in names or () if group])
    for group in groups:
        params = list(group["params"])
        if "param_names" in group:
            params = list(group["param_names"])
        elif params and not isinstance(params[0], str):
            params = list(_given(path, params, next(given, None)))
        fields = {key: value for key, value in group.items() if key != "param_names"}
        found.append({**fields, "params": params})
    return tuple(found)


class NamesNeededError(CheckpointError):
    """The parameters are only numbered, and whoever reads them must know their names."""


def _given(path: Path, params: Sequence[int], names: Sequence[str] | None) -> Sequence[str]:
    if names is None or len(names) != len(params):
        theirs = "none" if names is None else str(len(names))
        raise NamesNeededError(
            f"{path}: numbers its parameters and does not name them; its group of {len(params)} "
            f"must be this run's of {theirs}: train the same parameters in the same groups"
        )
    return names


def _entry(name: str, kind: str, stored: TensorRef) -> TensorEntry:
    whole = Box((0,) * len(stored.shape), stored.shape)
    extents = box_extents(
        stored.shape,
        whole,
        file=0,
        offset=stored.offset,
        itemsize=stored.dtype.itemsize,
        file_strides=stored.strides,
    )
    return TensorEntry(
        name=name, kind=kind, shape=stored.shape, dtype=stored.dtype, extents=Extents(extents)
    )
