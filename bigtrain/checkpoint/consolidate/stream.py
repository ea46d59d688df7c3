"""Copies tensors from wherever their elements lie to one place, in order and in little memory.

The output is written from front to back. A tensor's extents are read straight into the buffer
that is written next; where elements are cast, lie interleaved (a tensor cut by columns) or in
another order (a transposed one), a small tile is put together first.
"""

from __future__ import annotations

import mmap
import os
import threading
from collections import OrderedDict
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from bigtrain.checkpoint.consolidate.casting import Cast, make_cast
from bigtrain.checkpoint.consolidate.digest import Digest
from bigtrain.checkpoint.consolidate.frames import LowRank, OutputTensor
from bigtrain.checkpoint.consolidate.journal import FileJournal, SpoiledError
from bigtrain.checkpoint.consolidate.layout import OutputFile
from bigtrain.checkpoint.consolidate.outlet import Outlet, write_all
from bigtrain.checkpoint.consolidate.product import Product
from bigtrain.checkpoint.consolidate.sink import BUFFER_BYTES, Sink
from bigtrain.checkpoint.dtypes import DTYPES
from bigtrain.checkpoint.index import Extent, TensorEntry, TensorIndex
from bigtrain.checkpoint.strided import read_strided
from bigtrain.checkpoint.witness import RecordSource, Witness, no_records

_CAST_ELEMENTS = 1 << 17
"""At a time: source, result and what lies between stay in the processor's cache."""
_TILE_BYTES = 8 << 20
"""Of interleaved tensors: with pieces by a thousand ranks, reads are still 8 KiB each."""
_STRIDED_BYTES = 16 << 20
"""Of tensors in another order than their file's: a transposed one's rows are all read for each
tile, so that the time goes with their number. One worker at a time has such a tile."""
_MERGED_BYTES = 4 << 20
"""Of rows that an adapter is added to, in float32."""
_SPAN_BYTES = 4 << 20
_FACTOR_FILES = 4


class Stopped(Exception):  # noqa: N818 - a request, no fault
    """The copy was told to stop."""


@dataclass(frozen=True, kw_only=True)
class WrittenFile:
    """One complete file of the output."""

    name: str
    nbytes: int
    xxh3: str
    """xxh3-128 of the whole file, as `xxhsum -H2` prints it."""
    tensors: dict[str, str]
    """xxh3-128 of each tensor's bytes."""
    overflowed: dict[str, int] = field(default_factory=dict)
    """Tensors in which finite values became infinite in the new precision, and how many."""


def _enter(
    journal: FileJournal,
    hashes: dict[str, str],
    name: str,
    digest: Digest,
    end: int,
    infinite: int,
) -> None:
    """All of a tensor has gone through its digest."""
    hashes[name] = digest.hexdigest()
    journal.copied(name, hashes[name], end=end, infinite=infinite)


def _fill(fd: int, path: Path, offset: int, out: memoryview) -> None:
    filled = 0
    while filled < out.nbytes:
        try:
            count = os.preadv(fd, [out[filled:]], offset + filled)
        except OSError as fault:  # which doesn't know the file's name
            raise OSError(fault.errno, fault.strerror, str(path)) from fault
        if count == 0:
            raise SpoiledError(
                f"{path}: ends at byte {offset + filled}, {out.nbytes - filled} bytes too early; "
                "the file is cut off"
            )
        filled += count


class Copier:
    """One worker. Its `witness` tells what it saw of the source.

    `merging` is held by the one that takes more memory: it merges, or turns a tensor round.
    """

    def __init__(
        self,
        index: TensorIndex,
        find_record: RecordSource,
        stopping: threading.Event,
        *,
        merging: threading.Lock,
        open_files: int,
    ) -> None:
        self.witness = Witness(find_record)
        self.done_bytes = 0
        """Of output."""
        self._index = index
        self._stopping = stopping
        self._merging = merging
        self._open_files = open_files
        self._open: OrderedDict[int, int] = OrderedDict()
        self._scratch = memoryview(b"")

    def write(self, file: OutputFile, path: Path, journal: FileJournal) -> WrittenFile:
        """Write the file's tensors, those aside that the journal has; on the disk afterwards.

        The header comes last: before it, no reader takes the file for a whole one.
        """
        frame = file.frame
        hashes: dict[str, str] = {}
        overflowed: dict[str, int] = {}
        outlet = Outlet(path)
        try:
            offset = len(frame.header)
            finished, whole, crcs = journal.finished(file, outlet.fd)
            for number, tensor in enumerate(finished):
                self._require(tensor)
                hashes[tensor.name] = journal.hashes[tensor.name]
                tail = frame.tail(number, crcs[number])
                offset = frame.offsets[number] + tensor.nbytes + len(tail)
                self.done_bytes += tensor.nbytes
            outlet.begin(offset, frame.nbytes)
            with Sink(outlet, offset=offset, digest=whole, on_synced=journal.synced) as sink:
                for number, tensor in enumerate(file.tensors[len(finished) :], len(finished)):
                    sink.put(frame.lead(number))
                    own = Digest(needs_crc=frame.needs_crc)
                    infinite = self._copy(tensor, sink, own)
                    sink.put(frame.tail(number, own.crc32))
                    crcs.append(own.crc32)
                    if infinite:
                        overflowed[tensor.name] = infinite
                    end = frame.offsets[number] + tensor.nbytes
                    sink.note(partial(_enter, journal, hashes, tensor.name, own, end, infinite))
                sink.put(frame.trailer(crcs))
            write_all(outlet.fd, frame.header, 0)
            os.fsync(outlet.fd)
        finally:
            outlet.close()
        overflowed.update(journal.overflowed)
        return WrittenFile(
            name=file.name,
            nbytes=frame.nbytes,
            xxh3=whole.hexdigest(),
            tensors=hashes,
            overflowed=overflowed,
        )

    def close(self) -> None:
        """Close the source's files."""
        while self._open:
            os.close(self._open.popitem()[1])

    def _copy(self, tensor: OutputTensor, sink: Sink, digest: Digest) -> int:
        """Give the tensor's bytes to the sink; how many values became infinite."""
        if tensor.update is not None:
            return self._copy_merged(tensor, tensor.update, sink, digest)
        cast = make_cast(tensor.entry.dtype, tensor.dtype)
        if tensor.entry.extents.is_strided:
            return self._copy_strided(tensor, cast, sink, digest)
        if tensor.entry.extents.is_interleaved:
            return self._copy_tiles(tensor, cast, sink, digest)
        if cast is None:
            return self._copy_bytes(tensor.entry, sink, digest)
        return self._copy_cast(tensor, cast, sink, digest)

    def _copy_bytes(self, entry: TensorEntry, sink: Sink, digest: Digest) -> int:
        for extent in entry.extents:
            offset, left = extent.offset, extent.run * entry.dtype.itemsize
            while left:
                space = sink.space(left)
                self._read(extent.file, offset, space, sink=sink)
                self._give(sink, space, digest)
                offset += space.nbytes
                left -= space.nbytes
        return 0

    def _copy_cast(self, tensor: OutputTensor, cast: Cast, sink: Sink, digest: Digest) -> int:
        infinite = 0
        width = tensor.entry.dtype.itemsize
        for extent in tensor.entry.extents:
            offset, left = extent.offset, extent.run
            while left:
                count = min(left, _CAST_ELEMENTS)
                tile = self._tile(count * width)
                self._read(extent.file, offset, tile)
                widths = (width, tensor.dtype.itemsize)
                infinite += self._give_cast(tile, widths, cast, sink, digest)
                offset += tile.nbytes
                left -= count
        return infinite

    def _copy_strided(
        self, tensor: OutputTensor, cast: Cast | None, sink: Sink, digest: Digest
    ) -> int:
        with self._merging:
            size = min(_STRIDED_BYTES, tensor.entry.nbytes)
            # Memory that goes back at once: the allocator would keep it for each thread.
            self._scratch = memoryview(mmap.mmap(-1, max(1, size)))
            try:
                return self._copy_tiles(tensor, cast, sink, digest, tile_bytes=_STRIDED_BYTES)
            finally:
                self._scratch = memoryview(b"")

    def _copy_tiles(
        self,
        tensor: OutputTensor,
        cast: Cast | None,
        sink: Sink,
        digest: Digest,
        *,
        tile_bytes: int = _TILE_BYTES,
    ) -> int:
        infinite = 0
        entry, width = tensor.entry, tensor.entry.dtype.itemsize
        step = tile_bytes // width
        for start in range(0, entry.numel, step):
            tile = self._gathered(entry, start, min(entry.numel, start + step))
            infinite += self._give_cast(tile, (width, tensor.dtype.itemsize), cast, sink, digest)
        return infinite

    def _copy_merged(
        self, tensor: OutputTensor, update: LowRank, sink: Sink, digest: Digest
    ) -> int:
        """W + scaling · B·A, some rows at a time."""
        entry, cast = tensor.entry, make_cast(DTYPES["float32"], tensor.dtype)
        if not entry.numel:
            return 0
        columns = entry.numel // entry.shape[0]
        step = max(1, _MERGED_BYTES // (4 * columns))
        infinite = 0
        # Pieces of the factors are read out of order, maybe twice: their records are checked later.
        sink.note(partial(self._need, update.a, update.b))
        factors = Copier(
            self._index,
            no_records,
            self._stopping,
            merging=self._merging,
            open_files=_FACTOR_FILES,
        )
        with self._merging, closing(factors):
            product = Product(update, factors._gathered)
            for row in range(0, entry.shape[0], step):
                end = min(entry.shape[0], row + step)
                tile = self._gathered(entry, row * columns, end * columns)
                merged = product.added_to(tile, entry.dtype, row, end)
                infinite += self._give_cast(merged, (4, tensor.dtype.itemsize), cast, sink, digest)
        return infinite

    def _gathered(self, entry: TensorEntry, start: int, stop: int) -> memoryview:
        """Elements [start, stop), until the next call."""
        tile = self._tile((stop - start) * entry.dtype.itemsize)
        for extent in entry.extents.overlapping(start, stop):
            self._gather(extent, entry.dtype.itemsize, start, stop, tile)
        return tile

    def _give_cast(
        self,
        tile: memoryview,
        widths: tuple[int, int],
        cast: Cast | None,
        sink: Sink,
        digest: Digest,
    ) -> int:
        """`widths` of an element in the tile, and in the output."""
        infinite, at = 0, 0
        stored, wanted = widths
        elements = tile.nbytes // stored
        while at < elements:
            count = min(elements - at, _CAST_ELEMENTS)
            space = sink.space(count * wanted)
            count = space.nbytes // wanted
            piece = tile[at * stored : (at + count) * stored]
            if cast is None:
                space[:] = piece
            else:
                infinite += cast(piece, space)
            self._give(sink, space, digest)
            at += count
        return infinite

    def _give(self, sink: Sink, filled: memoryview, digest: Digest) -> None:
        if self._stopping.is_set():
            raise Stopped
        if digest.needs_crc:  # which goes behind the tensor
            digest.update(filled)
        else:
            sink.note(partial(digest.update, filled))
        self.done_bytes += filled.nbytes
        sink.take(filled.nbytes)

    def _gather(self, extent: Extent, width: int, start: int, stop: int, tile: memoryview) -> None:
        """Put what an extent holds of elements [start, stop) into their places in `tile`."""
        if extent.axes:
            self._gather_strided(extent, width, start, stop, tile)
            return
        if extent.runs == 1:
            self._gather_cut(extent, width, start, stop, tile, 0)
            return
        first = max(0, -(-(start - extent.start) // extent.stride))
        last = min(extent.runs, (stop - extent.run - extent.start) // extent.stride + 1)
        together = max(1, _SPAN_BYTES // max(1, extent.file_stride))
        self._gather_cut(extent, width, start, stop, tile, first - 1)
        for begin in range(first, last, together):
            self._scatter(extent, width, start, tile, begin, min(last, begin + together))
        self._gather_cut(extent, width, start, stop, tile, max(first, last))

    def _gather_strided(
        self, extent: Extent, width: int, start: int, stop: int, tile: memoryview
    ) -> None:
        """Of an extent in another order. Its bytes come out of theirs: they are checked later."""
        path, fd = self._index.files[extent.file], self._descriptor(extent.file)
        self.witness.needs(path, extent.offset)
        low, high = max(start, extent.start), min(stop, extent.start + extent.run)
        read_strided(
            extent.axes,
            offset=extent.offset,
            width=width,
            start=low - extent.start,
            out=tile[(low - start) * width : (high - start) * width],
            read=partial(_fill, fd, path),
        )

    def _gather_cut(
        self, extent: Extent, width: int, start: int, stop: int, tile: memoryview, k: int
    ) -> None:
        """Run k of an extent, of which only a part may be in the tile."""
        begin = extent.start + k * extent.stride
        low, high = max(start, begin), min(stop, begin + extent.run)
        if 0 <= k < extent.runs and low < high:
            offset = extent.offset + k * extent.file_stride + (low - begin) * width
            self._read(extent.file, offset, tile[(low - start) * width : (high - start) * width])

    def _scatter(
        self, extent: Extent, width: int, start: int, tile: memoryview, begin: int, end: int
    ) -> None:
        """Runs [begin, end) of an extent, which lie whole in the tile."""
        import numpy  # not at module level: most tensors are not interleaved
        from numpy.lib.stride_tricks import as_strided

        nbytes = extent.run * width
        span = memoryview(bytearray((end - begin - 1) * extent.file_stride + nbytes))
        self._read(extent.file, extent.offset + begin * extent.file_stride, span)
        target = (extent.start + begin * extent.stride - start) * width
        shape = (end - begin, nbytes)
        source = as_strided(
            numpy.frombuffer(span, numpy.uint8), shape, (extent.file_stride, 1), writeable=False
        )
        places = as_strided(
            numpy.frombuffer(tile[target:], numpy.uint8), shape, (extent.stride * width, 1)
        )
        places[...] = source

    def _tile(self, nbytes: int) -> memoryview:
        if self._scratch.nbytes < nbytes:
            self._scratch = memoryview(bytearray(max(nbytes, BUFFER_BYTES)))
        return self._scratch[:nbytes]

    def _read(self, file: int, offset: int, out: memoryview, sink: Sink | None = None) -> None:
        """Fill `out`, which is the sink's own room where one is given."""
        fd, path = self._descriptor(file), self._index.files[file]
        _fill(fd, path, offset, out)
        if sink is None:
            self.witness.saw(path, fd, offset, out)
        else:
            sink.note(partial(self.witness.saw, path, fd, offset, out))

    def _require(self, tensor: OutputTensor) -> None:
        update = tensor.update
        self._need(tensor.entry, *([update.a, update.b] if update else []))

    def _need(self, *entries: TensorEntry) -> None:
        for entry in entries:
            for extent in entry.extents:
                self.witness.needs(self._index.files[extent.file], extent.offset)

    def _descriptor(self, file: int) -> int:
        if file in self._open:
            self._open.move_to_end(file)
            return self._open[file]
        path = self._index.files[file]
        while len(self._open) >= self._open_files:
            os.close(self._open.popitem(last=False)[1])
        self._open[file] = os.open(path, os.O_RDONLY)
        return self._open[file]
