"""What an adapter adds to some rows of a matrix. Needs numpy, but no torch.

In float32 whatever is stored, and rounded once, to what is written. PEFT rounds the product first
where the adapter is in half precision.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bigtrain.checkpoint.consolidate.casting import as_float32
from bigtrain.checkpoint.consolidate.frames import LowRank
from bigtrain.checkpoint.dtypes import DType

if TYPE_CHECKING:
    import numpy as np


class Product:
    """scaling · B·A, as the matrix that it is added to is stored."""

    def __init__(self, update: LowRank, a: bytes, b: bytes) -> None:
        self._scaling = update.scaling
        left = as_float32(memoryview(b), update.b.dtype).reshape(-1, update.rank)
        right = as_float32(memoryview(a), update.a.dtype).reshape(update.rank, -1)
        self._left: np.ndarray[Any, Any] = right.T if update.is_transposed else left
        self._right: np.ndarray[Any, Any] = left.T if update.is_transposed else right

    def added_to(self, rows: memoryview, stored: DType, start: int, stop: int) -> memoryview:
        """Rows [start, stop) of the matrix with their part of the product, as float32."""
        merged = self._left[start:stop] @ self._right
        merged *= self._scaling
        merged += as_float32(rows, stored).reshape(merged.shape)
        return memoryview(merged).cast("B")
