"""bigtrain's own checkpoints, in either layout: the manifest's parts say where everything lies.

A checkpoint of thousands of ranks has millions of items, so they are never looked at one by one:
ranks that stored pieces of the same tensors in the same order make up a table, and a tensor's
extents are a column of it.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Mapping, Sequence
from itertools import compress
from pathlib import Path
from typing import TypeAlias

from bigtrain.checkpoint.dtypes import dtype_named
from bigtrain.checkpoint.index import Extents, TensorEntry, TensorIndex
from bigtrain.checkpoint.items import StoredItems
from bigtrain.checkpoint.manifest import Manifest, Part, StoredTensor
from bigtrain.errors import CheckpointError

_Key: TypeAlias = tuple[str, str]
_PLACES = ("file", "payload", "start", "numel")
_Columns: TypeAlias = "tuple[array[int], ...]"
"""Of one tensor's items: `_PLACES`, with files as the index numbers them."""


def read_committed(
    checkpoint: Path, *, manifest: Manifest | None, parts: Sequence[Part]
) -> TensorIndex:
    """The index of a checkpoint, also of one that has no root yet. No other file is opened."""
    tensors = _tensors(checkpoint, parts)
    files: dict[str, int] = {}
    found: dict[_Key, list[_Columns]] = {key: [] for key in tensors}
    for group in _alike(parts):
        for key, columns in _columns(group, files):
            found[key].append(columns)
    return TensorIndex(
        files=tuple(checkpoint / name for name in files),
        entries={key: _entry(tensor, found.pop(key)) for key, tensor in tensors.items()},
        param_groups=manifest.param_groups if manifest else None,
    )


def _tensors(checkpoint: Path, parts: Sequence[Part]) -> dict[_Key, StoredTensor]:
    tensors: dict[_Key, StoredTensor] = {}
    # Thousands of ranks have the very same table.
    for table in {id(part.tensors): part.tensors for part in parts}.values():
        for tensor in table:
            key = (tensor.name, tensor.kind)
            if tensors.setdefault(key, tensor) != tensor:
                raise CheckpointError(
                    f"{checkpoint}: ranks disagree on the shape or type of {tensor.name} "
                    f"({tensor.kind}): {tensors[key].shape} and {tensor.shape}"
                )
    return tensors


def _alike(parts: Sequence[Part]) -> list[list[tuple[Part, StoredItems]]]:
    """Parts together whose items are of the same tensors, in the same order."""
    groups: dict[tuple[int, bytes], list[tuple[Part, StoredItems]]] = {}
    for part in parts:
        items = part.items if isinstance(part.items, StoredItems) else StoredItems.of(part.items)
        kind = (id(part.tensors), items.columns["tensor"].tobytes())
        groups.setdefault(kind, []).append((part, items))
    return list(groups.values())


def _columns(
    group: list[tuple[Part, StoredItems]], files: dict[str, int]
) -> Iterator[tuple[_Key, _Columns]]:
    """The items of each tensor, from all ranks of the group. Adds to `files`."""
    table, order = group[0][0].tensors, group[0][1].columns["tensor"]
    width = len(order)
    if not width:
        return
    whole = _joined([items for _, items in group], files)
    for position, tensor in enumerate(order):
        owner = table[tensor]
        columns = tuple(whole[name][position::width] for name in _PLACES)
        numels = columns[-1]
        if not all(numels):
            columns = tuple(array("q", compress(column, numels)) for column in columns)
        yield (owner.name, owner.kind), columns


def _joined(items: Sequence[StoredItems], files: dict[str, int]) -> Mapping[str, array[int]]:
    """The columns of several ranks, one rank after another."""
    whole = {name: array("q") for name in _PLACES}
    for each in items:
        numbers = [files.setdefault(name, len(files)) for name in each.files]
        whole["file"].extend(array("q", map(numbers.__getitem__, each.columns["file"])))
        for name in _PLACES[1:]:
            whole[name].extend(each.columns[name])
    return whole


def _entry(tensor: StoredTensor, found: Sequence[_Columns]) -> TensorEntry:
    file, offset, start, run = (array("q") for _ in _PLACES)
    for columns in found:
        for whole, column in zip((file, offset, start, run), columns, strict=True):
            whole.extend(column)
    return TensorEntry(
        name=tensor.name,
        kind=tensor.kind,
        shape=tensor.shape,
        dtype=dtype_named(tensor.dtype),
        extents=Extents.of_single_runs(file=file, offset=offset, start=start, run=run),
    )
