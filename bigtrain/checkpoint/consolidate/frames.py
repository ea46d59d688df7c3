"""What surrounds the tensors' bytes in a file of the output: a header, or a zip's records.

A file is written from front to back, so a frame has to know every place beforehand, and what
depends on a tensor's bytes (a zip's CRC-32) comes behind them. `Frame` is what the copy knows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Protocol

from bigtrain.checkpoint.dtypes import DType
from bigtrain.checkpoint.formats.safetensors import header_bytes
from bigtrain.checkpoint.index import TensorEntry


@dataclass(frozen=True, kw_only=True)
class LowRank:
    """What an adapter adds to a matrix: scaling · B·A."""

    a: TensorEntry
    """[rank, …]"""
    b: TensorEntry
    """[…, rank]"""
    rank: int
    scaling: float
    is_transposed: bool
    """The matrix is stored as its transpose, as those of embeddings are."""


@dataclass(frozen=True, kw_only=True)
class OutputTensor:
    """One tensor of the output."""

    name: str
    entry: TensorEntry
    dtype: DType
    update: LowRank | None = None
    """To add to the stored elements."""

    @property
    def nbytes(self) -> int:
        return self.entry.numel * self.dtype.itemsize


class Frame(Protocol):
    """Around tensors that lie in the order in which they were given."""

    header: bytes
    """Before the first tensor's lead. It is written last: without it the file is none."""
    offsets: Sequence[int]
    """Where each tensor's bytes begin."""
    nbytes: int
    """Of the whole file."""
    needs_crc: bool

    def lead(self, number: int) -> bytes:
        """Right before a tensor's bytes."""

    def tail(self, number: int, crc32: int) -> bytes:
        """Right behind them."""

    def trailer(self, crcs: Sequence[int]) -> bytes:
        """Behind everything."""


class SafetensorsFrame:
    """A header, then the tensors' bytes without gaps."""

    needs_crc = False

    def __init__(self, tensors: Sequence[OutputTensor]) -> None:
        self.header = header_bytes([(t.name, t.dtype, t.entry.shape) for t in tensors])
        *offsets, self.nbytes = accumulate(
            (tensor.nbytes for tensor in tensors), initial=len(self.header)
        )
        self.offsets: Sequence[int] = offsets

    def lead(self, number: int) -> bytes:
        return b""

    def tail(self, number: int, crc32: int) -> bytes:
        return b""

    def trailer(self, crcs: Sequence[int]) -> bytes:
        return b""
