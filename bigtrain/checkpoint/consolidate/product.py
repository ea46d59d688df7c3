"""What an adapter adds to some rows of a matrix. Needs numpy, but no torch.

In float32 whatever is stored, and rounded once, to what is written. PEFT rounds the product first
where the adapter is in half precision.

The factors may be as large as the matrix. Only a few MiB of them are in memory: for rows [a, b) of
the product, the left factor's rows [a, b) and all of the right one, both cut along the rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TypeAlias

from bigtrain.checkpoint.consolidate.casting import as_float32
from bigtrain.checkpoint.consolidate.frames import LowRank
from bigtrain.checkpoint.dtypes import DType
from bigtrain.checkpoint.index import TensorEntry

if TYPE_CHECKING:
    import numpy as np

    Matrix: TypeAlias = np.ndarray[Any, Any]

ReadElements = Callable[[TensorEntry, int, int], memoryview]
"""(tensor, start, stop) → the bytes of its elements [start, stop), until the next call."""

_PIECE_BYTES = 4 << 20
"""Of the left factor at a time, in float32, and of the right one unless that is held whole."""
_WHOLE_BYTES = 16 << 20
"""Every row needs all of the right factor: up to here it is read once and held."""
_READ_BYTES = 1 << 20


class _Factor:
    """A matrix [rows, columns] of which pieces are read."""

    def __init__(
        self, entry: TensorEntry, shape: tuple[int, int], read: ReadElements, *, is_turned: bool
    ) -> None:
        self.rows, self.columns = shape
        self._entry, self._read = entry, read
        self._is_turned = is_turned
        """Whether it is stored as its transpose."""

    @property
    def nbytes(self) -> int:
        return 4 * self.rows * self.columns

    def piece(self, rows: range, columns: range) -> Matrix:
        """Those rows and columns, in float32."""
        if self._is_turned:
            return self._stored(columns, rows, self.rows).T
        return self._stored(rows, columns, self.columns)

    def _stored(self, rows: range, columns: range, width: int) -> Matrix:
        import numpy

        found = numpy.empty((len(rows), len(columns)), numpy.float32)
        # Whole rows are neighbours, of which many are read at once.
        together = max(1, _READ_BYTES // (4 * width)) if len(columns) == width else 1
        for place in range(0, len(rows), together):
            target = found[place : place + together]
            start = rows[place] * width + columns.start
            elements = self._read(self._entry, start, start + target.size)
            target[...] = as_float32(elements, self._entry.dtype).reshape(target.shape)
        return found


class Product:
    """scaling · B·A, as the matrix that it is added to is stored."""

    def __init__(self, update: LowRank, read: ReadElements) -> None:
        self._rank, self._scaling = update.rank, update.scaling
        height, width = update.b.shape[0], update.a.numel // max(1, update.rank)
        if update.is_transposed:  # (B·A)ᵀ = Aᵀ·Bᵀ
            self._left = _Factor(update.a, (width, self._rank), read, is_turned=True)
            self._right = _Factor(update.b, (self._rank, height), read, is_turned=True)
        else:
            self._left = _Factor(update.b, (height, self._rank), read, is_turned=False)
            self._right = _Factor(update.a, (self._rank, width), read, is_turned=False)
        self._whole: Matrix | None = None
        if self._right.nbytes <= _WHOLE_BYTES:
            self._whole = self._right_at(range(self._rank))

    def added_to(self, rows: memoryview, stored: DType, start: int, stop: int) -> memoryview:
        """Rows [start, stop) of the matrix with their part of the product, as float32."""
        import numpy

        merged = numpy.zeros((stop - start, self._right.columns), numpy.float32)
        for ranks in self._cuts(stop - start):
            right = (
                self._right_at(ranks)
                if self._whole is None
                else self._whole[ranks.start : ranks.stop]
            )
            merged += self._left.piece(range(start, stop), ranks) @ right
        merged *= self._scaling
        merged += as_float32(rows, stored).reshape(merged.shape)
        return merged.data.cast("B")

    def _cuts(self, rows: int) -> Iterator[range]:
        """The rank in pieces, so that what is held of the factors is small."""
        longest = rows if self._whole is not None else max(rows, self._right.columns)
        step = max(1, _PIECE_BYTES // (4 * max(1, longest)))
        for begin in range(0, self._rank, step):
            yield range(begin, min(self._rank, begin + step))

    def _right_at(self, ranks: range) -> Matrix:
        return self._right.piece(ranks, range(self._right.columns))
