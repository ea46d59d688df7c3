"""The layout of engines that shard: torch DCP directories, weights and optimizer apart.

Every rank writes one `.distcp` file in each, its flat ranges cut into true-shaped boxes. Rank 0
then writes torch's own metadata from what all ranks' parts say, so that any tool of PyTorch reads
them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from bigtrain.checkpoint.blocks import HashingFile, hash_bytes
from bigtrain.checkpoint.boxes import Box, cut_range
from bigtrain.checkpoint.dcp_metadata import metadata_bytes
from bigtrain.checkpoint.formats.dcp import METADATA
from bigtrain.checkpoint.manifest import Part, StoredObject
from bigtrain.checkpoint.pieces import MODEL_KINDS, GroupField, Piece, Share
from bigtrain.checkpoint.torch_item import write_tensor
from bigtrain.checkpoint.written import Written

WEIGHTS = "weights"
OPTIMIZER = "optimizer"


def write_sharded(share: Share, written: Written) -> None:
    """Write this rank's shards. Every rank calls."""
    model = [piece for piece in share.pieces if piece.kind in MODEL_KINDS]
    _write_file(WEIGHTS, model, written)
    if share.has_optimizer:
        state = [piece for piece in share.pieces if piece.kind not in MODEL_KINDS]
        _write_file(OPTIMIZER, state, written, groups=share.group_fields)


def write_metadata(parts: Sequence[Part], written: Written) -> None:
    """Write `.metadata` of each directory from all ranks' parts. Rank 0 calls."""
    for directory in (WEIGHTS, OPTIMIZER):
        content = metadata_bytes(directory, parts)
        if content is not None:
            written.write_file(f"{directory}/{METADATA}", content)


def _write_file(
    directory: str, pieces: Sequence[Piece], written: Written, *, groups: Iterable[GroupField] = ()
) -> None:
    name = f"{directory}/__{written.rank}_0.distcp"
    with HashingFile(written.staging / name) as stream:
        for piece in pieces:
            _write_piece(stream, piece, written, name=name)
        for field in groups:
            begin = stream.tell()
            length = stream.write(field.content)
            written.add_object(
                StoredObject(
                    group=field.group, name=field.name, file=name, begin=begin, length=length
                )
            )
    written.add_file(name, stream.digest)


def _write_piece(stream: HashingFile, piece: Piece, written: Written, *, name: str) -> None:
    at, itemsize = 0, piece.dtype.itemsize
    for box in _boxes(piece):
        data = piece.data[at * itemsize : (at + box.numel) * itemsize]
        item = write_tensor(stream, data, dtype=piece.dtype, shape=box.sizes)
        written.add_item(
            piece,
            file=name,
            payload=item.payload,
            start=piece.start + at,
            numel=box.numel,
            item_hash=hash_bytes(data),
            begin=item.offset,
            length=item.length,
        )
        at += box.numel


def _boxes(piece: Piece) -> Iterable[Box]:
    if 0 in piece.shape:
        return [Box((0,) * len(piece.shape), piece.shape)]
    return cut_range(piece.shape, piece.start, piece.start + piece.numel)
