"""Which tensors of two checkpoints differ, and by how much. Streams; numpy is used where it is."""

from __future__ import annotations

import math
import struct
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from bigtrain.checkpoint.blocks import FilePool
from bigtrain.checkpoint.elements import read_elements
from bigtrain.checkpoint.index import BUFFER, WEIGHT, TensorEntry, TensorIndex

if TYPE_CHECKING:
    from bigtrain.checkpoint.inspect import Inspection

_CHUNK_ELEMENTS = 1 << 20
"""Compared at a time."""


@dataclass(frozen=True, kw_only=True)
class Difference:
    """How one tensor differs between two checkpoints."""

    name: str
    kind: str
    what: str
    """In words."""
    largest: float | None = None
    """Absolute; of elements that can be compared as numbers."""
    count: int | None = None
    """Elements that differ."""


def differences(ours: Inspection, theirs: Inspection) -> Iterator[Difference]:
    """The tensors that are not the same in both, with how far apart they are."""
    mine, others = ours.index.entries, theirs.index.entries
    pools = FilePool(find_record=None), FilePool(find_record=None)
    try:
        for key in sorted(mine.keys() | _known(others, mine)):
            name, kind = key
            first, second = mine.get(key), _entry(others, key)
            if first is None or second is None:
                only = ours.path if second is None else theirs.path
                yield Difference(name=name, kind=kind, what=f"only in {only}")
            elif first.shape != second.shape:
                yield Difference(name=name, kind=kind, what=f"{first.shape} and {second.shape}")
            else:
                yield from _compare(first, second, (ours.index, theirs.index), pools)
    finally:
        for pool in pools:
            pool.close()


def _compare(
    first: TensorEntry,
    second: TensorEntry,
    indexes: tuple[TensorIndex, TensorIndex],
    pools: tuple[FilePool, FilePool],
) -> Iterator[Difference]:
    count, largest = 0, 0.0
    for start in range(0, first.numel, _CHUNK_ELEMENTS):
        length = min(_CHUNK_ELEMENTS, first.numel - start)
        chunks = []
        for entry, index, pool in zip((first, second), indexes, pools, strict=True):
            out = bytearray(length * entry.dtype.itemsize)
            read_elements(index, entry, pool, start=start, out=memoryview(out))
            chunks.append(out)
        if first.dtype == second.dtype and chunks[0] == chunks[1]:
            continue
        differ, most = distance(
            chunks[0], first.dtype.name, chunks[1], second.dtype.name, elements=length
        )
        count, largest = count + differ, max(largest, most)
    if count or first.dtype != second.dtype:
        types = {first.dtype.name, second.dtype.name}
        what = "differs" if len(types) == 1 else f"{first.dtype.name} and {second.dtype.name}"
        yield Difference(name=first.name, kind=first.kind, what=what, largest=largest, count=count)


def element_of(index: TensorIndex, entry: TensorEntry, pool: FilePool) -> float | None:
    """The first element, as a number."""
    out = bytearray(entry.dtype.itemsize)
    read_elements(index, entry, pool, start=0, out=memoryview(out))
    values = _numbers(out, entry.dtype.name)
    return None if values is None else float(values[0])


def distance(
    mine: bytearray,
    dtype: str,
    theirs: bytearray,
    their_dtype: str,
    *,
    elements: int = 0,
    numpy: Any = ...,
) -> tuple[int, float]:
    """How many elements differ, and the largest difference of such as can be compared."""
    numpy = _find_numpy() if numpy is ... else numpy
    if numpy is not None and {dtype, their_dtype} <= _ARRAYS.keys():
        return _distance_of_arrays(
            numpy, _as_array(numpy, mine, dtype), _as_array(numpy, theirs, their_dtype)
        )
    ours, others = _numbers(mine, dtype), _numbers(theirs, their_dtype)
    if ours is None or others is None:
        # Of a type that Python has no numbers for: whole elements, where they are of one size.
        size = max(1, len(mine) // max(1, elements))
        places = range(0, min(len(mine), len(theirs)), size)
        return sum(mine[i : i + size] != theirs[i : i + size] for i in places), 0.0
    count, largest = 0, 0.0
    for a, b in zip(ours, others, strict=True):
        if a != b and not (math.isnan(a) and math.isnan(b)):
            count += 1
            largest = max(largest, abs(a - b))
    return count, largest


def _distance_of_arrays(numpy: Any, mine: Any, theirs: Any) -> tuple[int, float]:
    differs = (mine != theirs) & ~(numpy.isnan(mine) & numpy.isnan(theirs))
    count = int(numpy.count_nonzero(differs))
    if not count:
        return 0, 0.0
    with numpy.errstate(invalid="ignore", over="ignore"):
        apart = numpy.abs(mine[differs].astype("f8") - theirs[differs].astype("f8"))
    apart = apart[~numpy.isnan(apart)]
    return count, float(apart.max()) if apart.size else 0.0


def _find_numpy() -> Any:
    try:
        import numpy
    except ImportError:
        return None
    return numpy


_ARRAYS = {
    "float64": "<f8", "float32": "<f4", "float16": "<f2", "bfloat16": "<u2",
    "int64": "<i8", "int32": "<i4", "int16": "<i2", "int8": "i1", "uint8": "u1", "bool": "u1",
}  # fmt: skip


def _as_array(numpy: Any, data: bytearray, dtype: str) -> Any:
    values = numpy.frombuffer(data, dtype=_ARRAYS[dtype])
    if dtype != "bfloat16":
        return values
    return (values.astype("<u4") << 16).view("<f4")


def _known(
    others: Mapping[tuple[str, str], TensorEntry], mine: Mapping[tuple[str, str], TensorEntry]
) -> set[tuple[str, str]]:
    """Keys of the others', with buffers under the kind that they have here."""
    return {
        (name, BUFFER) if kind == WEIGHT and (name, BUFFER) in mine else (name, kind)
        for name, kind in others
    }


def _entry(
    entries: Mapping[tuple[str, str], TensorEntry], key: tuple[str, str]
) -> TensorEntry | None:
    name, kind = key
    if key not in entries and kind in (WEIGHT, BUFFER):
        return entries.get((name, WEIGHT)) or entries.get((name, BUFFER))
    return entries.get(key)


_FORMATS = {
    "float32": "f", "float64": "d", "int64": "q", "int32": "i", "int16": "h", "int8": "b",
    "uint64": "Q", "uint32": "I", "uint16": "H", "uint8": "B", "bool": "B",
}  # fmt: skip


def _numbers(data: bytearray, dtype: str) -> Sequence[float] | None:
    """The elements as numbers; None of types that Python has none for."""
    if dtype in _FORMATS:
        values = array(_FORMATS[dtype])
        values.frombytes(bytes(data))
        return values
    if dtype == "float16":
        return struct.unpack(f"<{len(data) // 2}e", data)
    if dtype == "bfloat16":
        wide = bytearray(2 * len(data))
        wide[2::4], wide[3::4] = data[0::2], data[1::2]
        return _numbers(wide, "float32")
    return None
