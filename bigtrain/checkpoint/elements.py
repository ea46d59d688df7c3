"""Reads any range of a tensor's elements from wherever its extents lie. No torch."""

from __future__ import annotations

from bigtrain.checkpoint.blocks import BLOCK_BYTES, FilePool, FileReader
from bigtrain.checkpoint.index import Extent, TensorEntry, TensorIndex
from bigtrain.checkpoint.strided import read_strided


def read_elements(
    index: TensorIndex, entry: TensorEntry, pool: FilePool, *, start: int, out: memoryview
) -> None:
    """Fill `out` with the bytes of the flattened tensor's elements from `start` on.

    Only the bytes asked for are read, and the blocks around them checked where hashes are known.
    The entry must be tiled: see `TensorIndex.check_tiling`.
    """
    itemsize = entry.dtype.itemsize
    stop = start + out.nbytes // itemsize
    for extent in entry.extents.overlapping(start, stop):
        reader = pool.reader(index.files[extent.file])
        if extent.runs > 1:
            _read_runs(reader, extent, itemsize, start=start, out=out)
            continue
        first, last = max(start, extent.start), min(stop, extent.start + extent.run)
        piece = out[(first - start) * itemsize : (last - start) * itemsize]
        if extent.axes:
            read_strided(
                extent.axes,
                offset=extent.offset,
                width=itemsize,
                start=first - extent.start,
                out=piece,
                read=reader.read_into,
            )
            continue
        reader.read_into(extent.offset + (first - extent.start) * itemsize, piece)


def _read_runs(
    reader: FileReader, extent: Extent, itemsize: int, *, start: int, out: memoryview
) -> None:
    """The runs of one extent: read together where they lie close, then put in their places."""
    stop = start + out.nbytes // itemsize
    first = max(0, (start - extent.start - extent.run) // extent.stride + 1)
    last = min(extent.runs, -(-(stop - extent.start) // extent.stride))
    together = max(1, BLOCK_BYTES // max(1, extent.file_stride))
    for begin in range(first, last, together):
        end = min(last, begin + together)
        span = (end - 1 - begin) * extent.file_stride + extent.run * itemsize
        tile = memoryview(reader.read(extent.offset + begin * extent.file_stride, span))
        for k in range(begin, end):
            at = extent.start + k * extent.stride
            low, high = max(start, at), min(stop, at + extent.run)
            source = (k - begin) * extent.file_stride + (low - at) * itemsize
            if low < high:
                out[(low - start) * itemsize : (high - start) * itemsize] = tile[
                    source : source + (high - low) * itemsize
                ]
