"""The zip that `torch.save` makes of a state dict, written from front to back and without torch.

    archive/data.pkl   the names, and for each tensor which record holds its elements
    archive/data/<i>   the elements of one tensor, at a multiple of 64 bytes; its CRC-32 behind it

The pickle is put together by hand: making it by `pickle` would need torch's functions, and reading
it with `torch.load(weights_only=True)` needs no others than those named here.
https://pkware.cachefly.net/webdocs/casestudies/APPNOTE.TXT
"""

from __future__ import annotations

import pickle
import struct
from collections.abc import Sequence

from bigtrain.checkpoint.boxes import contiguous_strides
from bigtrain.checkpoint.consolidate.frames import OutputTensor
from bigtrain.checkpoint.crc32 import crc32

_ALIGNMENT = 64
_ROOT = "archive"
_SMALL = 0xFFFFFFFF
"""Sizes and places from here on need the zip's 64-bit fields."""
_UTF8, _CRC_BEHIND = 0x0800, 0x0008
_LOCAL = struct.Struct("<IHHHHHIIIHH")
_CENTRAL = struct.Struct("<IHHHHHHIIIHHHHHII")
_END = struct.Struct("<IHHHHIIH")
_END_64 = struct.Struct("<IQHHIIQQQQ")
_LOCATOR_64 = struct.Struct("<IIQI")
_DATE = 0x21
"""The first of January 1980: the same model gives the same bytes."""


class TorchFrame:
    """The records of a zip around the tensors, which are stored as they are."""

    needs_crc = True

    def __init__(self, tensors: Sequence[OutputTensor]) -> None:
        self._small: list[tuple[int, str, bytes]] = []
        self.header = b""
        for name, content in (
            ("data.pkl", _state_dict(tensors)),
            ("byteorder", b"little"),
            ("version", b"3\n"),
        ):
            self._small.append((len(self.header), name, content))
            self.header += _small_record(len(self.header), name, content)
        self._sizes = [tensor.nbytes for tensor in tensors]
        self._leads: list[bytes] = []
        self._starts: list[int] = []
        offsets: list[int] = []
        at = len(self.header)
        for number, size in enumerate(self._sizes):
            self._starts.append(at)
            self._leads.append(_lead(at, f"data/{number}", size))
            offsets.append(at + len(self._leads[-1]))
            at = offsets[-1] + size + len(self.tail(number, 0))
        self.offsets: Sequence[int] = offsets
        self._end = at
        self.nbytes = at + len(self.trailer([0] * len(tensors)))

    def lead(self, number: int) -> bytes:
        return self._leads[number]

    def tail(self, number: int, crc32: int) -> bytes:
        size = self._sizes[number]
        return struct.pack("<IIQQ" if size >= _SMALL else "<IIII", 0x08074B50, crc32, size, size)

    def trailer(self, crcs: Sequence[int]) -> bytes:
        entries = [
            _entry(at, name, len(content), crc32(content), flags=_UTF8)
            for at, name, content in self._small
        ]
        entries += [
            _entry(at, f"data/{number}", size, crc, flags=_UTF8 | _CRC_BEHIND)
            for number, (at, size, crc) in enumerate(
                zip(self._starts, self._sizes, crcs, strict=True)
            )
        ]
        directory = b"".join(entries)
        return directory + _ending(len(entries), len(directory), self._end)


def _small_record(at: int, name: str, content: bytes) -> bytes:
    head = _local(name, _UTF8, crc32(content), len(content), _padding(at, name, 0))
    return head + content


def _lead(at: int, name: str, size: int) -> bytes:
    # Sizes behind the bytes are as wide as this field says that they are.
    wide = struct.pack("<HHQQ", 1, 16, 0, 0) if size >= _SMALL else b""
    return _local(name, _UTF8 | _CRC_BEHIND, 0, 0, wide + _padding(at, name, len(wide)))


def _local(name: str, flags: int, crc32: int, size: int, extra: bytes) -> bytes:
    encoded = f"{_ROOT}/{name}".encode()
    version = 45 if extra[:2] == b"\x01\x00" else 20
    shown = _SMALL if version == 45 else size
    fields = (0x04034B50, version, flags, 0, 0, _DATE, crc32, shown, shown)
    return _LOCAL.pack(*fields, len(encoded), len(extra)) + encoded + extra


def _padding(at: int, name: str, other: int) -> bytes:
    """A field that says nothing, so long that the record's content is aligned; as torch does it."""
    begin = at + _LOCAL.size + len(f"{_ROOT}/{name}".encode()) + other
    length = -(begin + 4) % _ALIGNMENT
    return struct.pack("<2sH", b"FB", length) + b"Z" * length


def _entry(at: int, name: str, size: int, crc32: int, *, flags: int) -> bytes:
    encoded = f"{_ROOT}/{name}".encode()
    wide = [value for value in (size, size, at) if value >= _SMALL]
    extra = struct.pack(f"<HH{len(wide)}Q", 1, 8 * len(wide), *wide) if wide else b""
    version = 45 if wide else 20
    shown = min(size, _SMALL)
    fields = (0x02014B50, version, version, flags, 0, 0, _DATE, crc32, shown, shown)
    lengths = (len(encoded), len(extra), 0, 0, 0, 0, min(at, _SMALL))
    return _CENTRAL.pack(*fields, *lengths) + encoded + extra


def _ending(count: int, length: int, at: int) -> bytes:
    wide = b""
    if count >= 0xFFFF or length >= _SMALL or at >= _SMALL:
        wide = _END_64.pack(
            0x06064B50, _END_64.size - 12, 45, 45, 0, 0, count, count, length, at
        ) + _LOCATOR_64.pack(0x07064B50, 0, at + length, 1)
    shown = min(count, 0xFFFF)
    return wide + _END.pack(0x06054B50, 0, 0, shown, shown, min(length, _SMALL), min(at, _SMALL), 0)


def _state_dict(tensors: Sequence[OutputTensor]) -> bytes:
    """The pickle of `{name: tensor}`, whose elements are in record i each."""
    parts = [pickle.PROTO, b"\x02", pickle.EMPTY_DICT, pickle.MARK]
    for number, tensor in enumerate(tensors):
        parts += [_text(tensor.name), _tensor(number, tensor)]
    return b"".join([*parts, pickle.SETITEMS, pickle.STOP])


def _tensor(number: int, tensor: OutputTensor) -> bytes:
    shape = tensor.entry.shape
    storage = tensor.dtype.storage
    rebuild = "_rebuild_tensor_v2" if storage else "_rebuild_tensor_v3"
    elements = tensor.entry.numel if storage else tensor.nbytes
    reference = _tuple(
        _text("storage"),
        _global("torch", storage) if storage else _global("torch.storage", "UntypedStorage"),
        _text(str(number)),
        _text("cpu"),
        _integer(elements),
    )
    arguments = [
        reference + pickle.BINPERSID,
        _integer(0),
        _tuple(*map(_integer, shape)),
        _tuple(*map(_integer, contiguous_strides(shape))),
        pickle.NEWFALSE,
        _global("collections", "OrderedDict") + pickle.EMPTY_TUPLE + pickle.REDUCE,
    ]
    if not storage:
        arguments.append(_global("torch", tensor.dtype.name))
    return _global("torch._utils", rebuild) + _tuple(*arguments) + pickle.REDUCE


def _text(text: str) -> bytes:
    encoded = text.encode()
    return pickle.BINUNICODE + struct.pack("<I", len(encoded)) + encoded


def _integer(value: int) -> bytes:
    data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return pickle.LONG1 + bytes([len(data)]) + data


def _tuple(*items: bytes) -> bytes:
    return b"".join([pickle.MARK, *items, pickle.TUPLE])


def _global(module: str, name: str) -> bytes:
    return pickle.GLOBAL + f"{module}\n{name}\n".encode()
