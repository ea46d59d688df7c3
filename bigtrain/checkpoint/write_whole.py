"""The layout of transformers' own Trainer, for engines whose rank 0 holds everything.

The model's files are the caller's, as `save_pretrained` writes them: it may rename, join, split,
cast or leave out tensors. So each trained tensor is looked up among what was written, by its
name and then by its content; what is not there to the last bit goes to `training_weights`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from bigtrain.checkpoint.blocks import FilePool, HashingFile, hash_bytes
from bigtrain.checkpoint.elements import read_elements
from bigtrain.checkpoint.formats.safetensors import header_bytes, read_safetensors
from bigtrain.checkpoint.formats.transformers_dir import OPTIMIZER, weight_files
from bigtrain.checkpoint.index import Extent
from bigtrain.checkpoint.pieces import MODEL_KINDS, Piece, Share
from bigtrain.checkpoint.torch_item import write_archive
from bigtrain.checkpoint.written import Written

TRAINING_WEIGHTS = "training_weights.safetensors"
"""Weights that the model's own files don't hold exactly as they are trained."""


class _Place(NamedTuple):
    file: Path
    offset: int


class _Content(NamedTuple):
    """What makes two stored tensors the same."""

    dtype: str
    shape: tuple[int, ...]
    hash: bytes


def write_whole(share: Share, written: Written) -> None:
    """Add the training state to a staging that holds the model's files. Rank 0 calls."""
    model = [piece for piece in share.pieces if piece.kind in MODEL_KINDS]
    missing = _find_written(model, written)
    if missing:
        _write_weights(missing, written)
    if share.optimizer is not None:
        pieces = [share.pieces[number] for number in share.optimizer.pieces]
        _write_optimizer(share.optimizer.pickle, pieces, written)


def _find_written(pieces: Sequence[Piece], written: Written) -> list[Piece]:
    """Record where the model's files hold the pieces; those that they don't hold."""
    by_name, by_content = _contents(weight_files(written.staging))
    missing: list[Piece] = []
    for piece in pieces:
        digest = hash_bytes(piece.data)
        content = _Content(piece.dtype.name, piece.shape, digest)
        named, place = by_name.get(piece.name, (None, None))
        if named != content:
            place = by_content.get(content)
        if place is None:
            missing.append(piece)
            continue
        _add_whole(piece, written, file=place.file, payload=place.offset, item_hash=digest)
    return missing


def _contents(
    files: Sequence[Path],
) -> tuple[dict[str, tuple[_Content, _Place]], dict[_Content, _Place]]:
    """What safetensors files hold, by name and by content."""
    index = read_safetensors(files)
    by_name: dict[str, tuple[_Content, _Place]] = {}
    by_content: dict[_Content, _Place] = {}
    with contextlib.closing(FilePool()) as pool:
        for entry in index.entries.values():
            data = memoryview(bytearray(entry.nbytes))
            read_elements(index, entry, pool, start=0, out=data)
            content = _Content(entry.dtype.name, entry.shape, hash_bytes(data))
            first: Extent = entry.extents[0] if len(entry.extents) else Extent(0, 0, 0, 0)
            by_name[entry.name] = (content, _Place(index.files[first.file], first.offset))
            by_content.setdefault(content, by_name[entry.name][1])
    return by_name, by_content


def _write_weights(pieces: Sequence[Piece], written: Written) -> None:
    path = written.staging / TRAINING_WEIGHTS
    with HashingFile(path) as stream:
        stream.write(header_bytes([(p.name, p.dtype, p.shape) for p in pieces]))
        for piece in pieces:
            payload = stream.tell()
            stream.write(piece.data)
            digest = hash_bytes(piece.data)
            _add_whole(piece, written, file=path, payload=payload, item_hash=digest)
    written.add_file(TRAINING_WEIGHTS, stream.digest)


def _write_optimizer(pickle: bytes, pieces: Sequence[Piece], written: Written) -> None:
    """Write `optimizer.pt` as torch's optimizers lay out their state, and record what is where."""
    path = written.staging / OPTIMIZER
    with HashingFile(path) as stream:
        item = write_archive(stream, pickle, [piece.data for piece in pieces])
    written.add_file(OPTIMIZER, stream.digest)
    for piece, payload in zip(pieces, item.payloads, strict=True):
        digest = hash_bytes(piece.data)
        _add_whole(piece, written, file=path, payload=payload, item_hash=digest)


def _add_whole(
    piece: Piece, written: Written, *, file: Path, payload: int, item_hash: bytes
) -> None:
    written.add_item(
        piece,
        file=file.relative_to(written.staging).as_posix(),
        payload=payload,
        start=0,
        numel=piece.numel,
        item_hash=item_hash,
    )
