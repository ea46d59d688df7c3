"""Writes tensors as `torch.save` would, straight from their bytes and without torch.

The elements go to the stream in one piece, never through a copy, and their place is known at
once. `torch.load`, `torch.distributed.checkpoint` and any zip tool read the result.
"""

from __future__ import annotations

import struct
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from bigtrain.checkpoint.boxes import contiguous_strides
from bigtrain.checkpoint.crc32 import crc32
from bigtrain.checkpoint.dtypes import DType

_ALIGNMENT = 64
"""Of the elements, from the file's beginning: torch's own, for memory-mapped use."""
_ZIP64_FROM = 0xFFFFFFFF
_NO_DATE = 0x21
"""1 January 1980, the earliest that a zip can say."""


class Stream(Protocol):
    """Where bytes go, one after another."""

    def tell(self) -> int: ...

    def write(self, data: bytes | memoryview, /) -> int: ...


@dataclass(frozen=True, kw_only=True)
class WrittenItem:
    """Where an item lies in its file, in bytes."""

    offset: int
    length: int
    payloads: tuple[int, ...]
    """Of the first byte of each storage, from the file's beginning."""

    @property
    def payload(self) -> int:
        """Of the only storage."""
        return self.payloads[0]


def write_tensor(
    stream: Stream, data: memoryview, *, dtype: DType, shape: Sequence[int]
) -> WrittenItem:
    """Append a row-major tensor, whose bytes are `data`, to `stream`."""
    return write_archive(stream, tensor_pickle(dtype, shape), [data])


def write_archive(stream: Stream, pickle: bytes, storages: Sequence[memoryview]) -> WrittenItem:
    """Append the zip of an object, whose pickle refers to `storages` by their number."""
    begin = stream.tell()
    directory: list[bytes] = []
    small = {
        "data.pkl": pickle,
        ".format_version": b"1",
        ".storage_alignment": str(_ALIGNMENT).encode(),
        "byteorder": sys.byteorder.encode(),
    }
    for name, content in small.items():
        _write_record(stream, begin, directory, name, memoryview(content), alignment=1)
    payloads = tuple(
        _write_record(stream, begin, directory, f"data/{number}", data, alignment=_ALIGNMENT)
        for number, data in enumerate(storages)
    )
    _write_record(stream, begin, directory, "version", memoryview(b"3\n"), alignment=1)
    _write_directory(stream, begin, directory)
    return WrittenItem(offset=begin, length=stream.tell() - begin, payloads=payloads)


def item_bound(nbytes: int) -> int:
    """More bytes than an item with `nbytes` of elements takes."""
    return nbytes + 2048


def tensor_pickle(dtype: DType, shape: Sequence[int]) -> bytes:
    """The pickle of a tensor: a call that names storage 0, in protocol 2 as torch writes it."""
    storage = f"torch\n{dtype.storage}" if dtype.storage else "torch.storage\nUntypedStorage"
    elements = 1
    for size in shape:
        elements *= size
    rebuild = "_rebuild_tensor_v2" if dtype.storage else "_rebuild_tensor_v3"
    stored = elements if dtype.storage else elements * dtype.itemsize
    parts = [
        b"\x80\x02",
        f"ctorch._utils\n{rebuild}\n".encode(),
        b"((" + _text("storage") + f"c{storage}\n".encode() + _text("0") + _text("cpu"),
        _integer(stored) + b"tQ" + _integer(0),
        _integers(shape) + _integers(contiguous_strides(shape)),
        b"\x89" + b"ccollections\nOrderedDict\n)R",
        b"" if dtype.storage else f"ctorch\n{dtype.name}\n".encode(),
        b"tR.",
    ]
    return b"".join(parts)


def _text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def _integer(value: int) -> bytes:
    if value < 2**31:
        return b"J" + struct.pack("<i", value)
    return b"\x8a\x08" + struct.pack("<q", value)


def _integers(values: Sequence[int]) -> bytes:
    return b"(" + b"".join(map(_integer, values)) + b"t"


def _write_record(
    stream: Stream,
    begin: int,
    directory: list[bytes],
    name: str,
    data: memoryview,
    *,
    alignment: int,
) -> int:
    """Append one record; the place of its content. Adds its entry to `directory`."""
    at = stream.tell()
    encoded = f"archive/{name}".encode()
    size, crc = data.nbytes, crc32(data)
    zip64 = struct.pack("<HHQQ", 1, 16, size, size) if size >= _ZIP64_FROM else b""
    short = min(size, _ZIP64_FROM)
    unpadded = at + 30 + len(encoded) + len(zip64)
    # An extra field takes at least four bytes for its own header.
    padding = -unpadded % alignment
    padding += alignment if 0 < padding < 4 else 0
    extra = zip64
    if padding:
        extra += struct.pack("<2sH", b"FB", padding - 4) + b"Z" * (padding - 4)
    fields = (45 if zip64 else 0, 0x0800, 0, 0, _NO_DATE, crc, short, short, len(encoded))
    stream.write(struct.pack("<4sHHHHHIIIHH", b"PK\x03\x04", *fields, len(extra)))
    stream.write(encoded + extra)
    payload = stream.tell()
    stream.write(data)
    directory.append(_directory_entry(encoded, size, crc, at - begin))
    return payload


def _directory_entry(encoded: bytes, size: int, crc: int, offset: int) -> bytes:
    wide = [value for value in (size, size, offset) if value >= _ZIP64_FROM]
    extra = struct.pack(f"<HH{len(wide)}Q", 1, 8 * len(wide), *wide) if wide else b""
    short, near = min(size, _ZIP64_FROM), min(offset, _ZIP64_FROM)
    version = 45 if wide else 0
    head = (version, version, 0x0800, 0, 0, _NO_DATE, crc, short, short, len(encoded), len(extra))
    return (
        struct.pack("<4sHHHHHHIIIHHHHHII", b"PK\x01\x02", *head, 0, 0, 0, 0, near) + encoded + extra
    )


def _write_directory(stream: Stream, begin: int, directory: list[bytes]) -> None:
    at = stream.tell() - begin
    entries = b"".join(directory)
    count, size = len(directory), len(entries)
    stream.write(entries)
    if at >= _ZIP64_FROM:
        end = stream.tell() - begin
        record = (44, 45, 45, 0, 0, count, count, size, at)
        stream.write(struct.pack("<4sQHHIIQQQQ", b"PK\x06\x06", *record))
        stream.write(struct.pack("<4sIQI", b"PK\x06\x07", 0, end, 1))
    tail = (0, 0, count, count, size, min(at, _ZIP64_FROM), 0)
    stream.write(struct.pack("<4sHHHHIIH", b"PK\x05\x06", *tail))
