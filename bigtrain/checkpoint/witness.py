"""Checksums of what the source stored, checked on the bytes as they pass.

A record is a range of a file whose checksum was stored when it was written: the CRC-32 of a
`torch.save` zip's record, or the xxh3 of an item of bigtrain's own. Workers report what they
read; at the end all that they touched has been checked whole, and what nobody read of a record
(the padding in it, or what an interrupted attempt had copied) is read for that alone.
"""

from __future__ import annotations

import os
import threading
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import xxhash

from bigtrain.checkpoint.crc32 import combine_crc32, crc32
from bigtrain.errors import CheckpointError

_GAP_BYTES = 64 << 10
"""Read along with what is asked for, if a record's next bytes are no further away."""
_BUFFER_BYTES = 1 << 20


class Record(NamedTuple):
    """A range of a file, and its checksum: `crc32` or the digest `xxh3`; neither: none stored."""

    start: int
    stop: int
    crc32: int | None = None
    xxh3: bytes | None = None

    @property
    def is_checked(self) -> bool:
        return self.crc32 is not None or self.xxh3 is not None


class Records:
    """The records of one file, found by any byte in them."""

    def __init__(self, records: Iterable[Record]) -> None:
        self._records = sorted(records)
        self._starts = [record.start for record in self._records]

    def at(self, offset: int) -> Record | None:
        """The record that holds this byte."""
        position = bisect_right(self._starts, offset) - 1
        if position < 0 or self._records[position].stop <= offset:
            return None
        return self._records[position]

    def __iter__(self) -> Iterator[Record]:
        return iter(self._records)


RecordSource = Callable[[Path, int], "Record | None"]
"""(file, offset) → the record that holds this byte."""


@dataclass
class _Passage:
    """Neighbouring bytes of a record that went by, one after another."""

    record: Record
    start: int
    reached: int
    crc32: int = 0
    xxh3: xxhash.xxh3_128 | None = field(default_factory=xxhash.xxh3_128)

    def take(self, data: memoryview) -> None:
        """The next bytes."""
        if self.record.xxh3 is None:
            self.crc32 = crc32(data, self.crc32)
        elif self.xxh3 is not None:
            self.xxh3.update(data)
        self.reached += data.nbytes


class Witness:
    """What one worker saw of the source, and the thread that checks for it."""

    def __init__(self, find: RecordSource) -> None:
        self._find = find
        self._guard = threading.Lock()
        self._open: dict[Path, _Passage] = {}
        self.passages: dict[Path, list[_Passage]] = {}

    def saw(self, path: Path, fd: int, offset: int, data: memoryview) -> None:
        """`data` was read from `offset` of `path`; it lies in one record."""
        with self._guard:
            self._saw(path, fd, offset, data)

    def _saw(self, path: Path, fd: int, offset: int, data: memoryview) -> None:
        passage = self._open.get(path)
        if passage is None or not passage.record.start <= offset < passage.record.stop:
            passage = self._begin(path, offset)
            if passage is None:
                return
        if offset != passage.reached:
            passage = self._jump(passage, path, fd, offset)
        passage.take(data)

    def needs(self, path: Path, offset: int) -> None:
        """The record with this byte has to be checked, though nobody here reads it."""
        with self._guard:
            passage = self._open.get(path)
            if passage is None or not passage.record.start <= offset < passage.record.stop:
                self._begin(path, offset)

    def _begin(self, path: Path, offset: int) -> _Passage | None:
        record = self._find(path, offset)
        if record is None or not record.is_checked:
            return None
        return self._add(path, _Passage(record, record.start, record.start))

    def _jump(self, passage: _Passage, path: Path, fd: int, offset: int) -> _Passage:
        gap = offset - passage.reached
        if 0 < gap <= _GAP_BYTES:
            for piece in _read(path, fd, passage.reached, offset):
                passage.take(piece)
            return passage
        if passage.record.xxh3 is not None:
            # These can't be put together from parts: read the record again at the end.
            passage.xxh3 = None
            passage.reached = offset
            return passage
        return self._add(path, _Passage(passage.record, offset, offset))

    def _add(self, path: Path, passage: _Passage) -> _Passage:
        self._open[path] = passage
        self.passages.setdefault(path, []).append(passage)
        return passage


@dataclass(frozen=True, kw_only=True)
class Damage:
    """A record whose bytes are not those that were written."""

    path: Path
    record: Record


def find_damage(witnesses: Sequence[Witness]) -> Iterator[Damage]:
    """The damaged ones of all records that any of the workers touched."""
    by_record: dict[tuple[Path, Record], list[_Passage]] = {}
    for witness in witnesses:
        for path, passages in witness.passages.items():
            for passage in passages:
                by_record.setdefault((path, passage.record), []).append(passage)
    for (path, record), passages in by_record.items():
        if not _holds(path, record, passages):
            yield Damage(path=path, record=record)


def record_holds(path: Path, record: Record) -> bool:
    """Whether a record's bytes are those that were written. All of it is read."""
    return _holds(path, record, ())


def _holds(path: Path, record: Record, passages: Sequence[_Passage]) -> bool:
    if record.xxh3 is not None:
        for passage in passages:
            if passage.xxh3 is not None and passage.reached == record.stop:
                return passage.xxh3.digest() == record.xxh3
        return _digest(path, record) == record.xxh3
    return _combined_crc32(path, record, passages) == record.crc32


def _combined_crc32(path: Path, record: Record, passages: Sequence[_Passage]) -> int:
    crc, at = 0, record.start
    with path.open("rb", buffering=0) as file:
        for passage in sorted(passages, key=lambda passage: passage.start):
            if passage.start < at or passage.reached == passage.start:
                continue
            for piece in _read(path, file.fileno(), at, passage.start):
                crc = crc32(piece, crc)
            crc = combine_crc32(crc, passage.crc32, passage.reached - passage.start)
            at = passage.reached
        for piece in _read(path, file.fileno(), at, record.stop):
            crc = crc32(piece, crc)
    return crc


def _digest(path: Path, record: Record) -> bytes:
    hasher = xxhash.xxh3_128()
    with path.open("rb", buffering=0) as file:
        for piece in _read(path, file.fileno(), record.start, record.stop):
            hasher.update(piece)
    return hasher.digest()


def _read(path: Path, fd: int, start: int, stop: int) -> Iterator[memoryview]:
    buffer = memoryview(bytearray(min(_BUFFER_BYTES, max(0, stop - start))))
    while start < stop:
        count = os.preadv(fd, [buffer[: stop - start]], start)
        if not count:
            raise CheckpointError(f"{path}: ends at byte {start}; the file is cut off")
        yield buffer[:count]
        start += count


def no_records(_path: Path, _offset: int) -> Record | None:
    """For sources that store no checksums."""
    return None
