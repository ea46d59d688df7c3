"""bigtrain's own checkpoints, in either layout: the manifest's parts say where everything lies."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from bigtrain.checkpoint.dtypes import dtype_named
from bigtrain.checkpoint.index import Extent, Extents, TensorEntry, TensorIndex
from bigtrain.checkpoint.manifest import Manifest, Part, StoredTensor
from bigtrain.errors import CheckpointError


def read_committed(
    checkpoint: Path, *, manifest: Manifest | None, parts: Sequence[Part]
) -> TensorIndex:
    """The index of a checkpoint, also of one that has no root yet. No other file is opened."""
    files: dict[str, int] = {}
    tensors: dict[tuple[str, str], StoredTensor] = {}
    extents: dict[tuple[str, str], list[Extent]] = {}
    for part in parts:
        for tensor in part.tensors:
            key = (tensor.name, tensor.kind)
            if tensors.setdefault(key, tensor) != tensor:
                raise CheckpointError(
                    f"{checkpoint}: ranks disagree on the shape or type of {tensor.name} "
                    f"({tensor.kind}): {tensors[key].shape} and {tensor.shape}"
                )
            extents.setdefault(key, [])
        for item in part.items:
            if not item.numel:
                continue
            owner = part.tensors[item.tensor]
            file = files.setdefault(item.file, len(files))
            extents[owner.name, owner.kind].append(
                Extent(file=file, offset=item.payload, start=item.start, run=item.numel)
            )
    return TensorIndex(
        files=tuple(checkpoint / name for name in files),
        entries={key: _entry(tensor, extents[key]) for key, tensor in tensors.items()},
        param_groups=manifest.param_groups if manifest else None,
    )


def _entry(tensor: StoredTensor, extents: list[Extent]) -> TensorEntry:
    return TensorEntry(
        name=tensor.name,
        kind=tensor.kind,
        shape=tensor.shape,
        dtype=dtype_named(tensor.dtype),
        extents=Extents(extents),
    )
