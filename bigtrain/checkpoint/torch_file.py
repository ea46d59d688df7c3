"""Reads what `torch.save` wrote, without torch and without running its pickle.

The file is an uncompressed zip: `…/data.pkl` holds the structure, in which every tensor is a
reference to `…/data/<key>`, its raw storage. A `.distcp` file is many such zips one after another.
https://docs.pytorch.org/docs/stable/notes/serialization.html
"""

from __future__ import annotations

import io
import os
import struct
import zipfile
import zlib
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from bigtrain.checkpoint.dtypes import BY_STORAGE, DTYPES, DType
from bigtrain.checkpoint.inert import Inert, brief, read_name, read_pickle
from bigtrain.errors import CheckpointError

_LOCAL_HEADER = struct.Struct("<4s22xHH")
"""Signature, and the lengths of name and extra field; the payload follows those two."""
NO_ZIP = (
    zipfile.BadZipFile,
    OSError,
    EOFError,
    NotImplementedError,
    ValueError,
    struct.error,
    zlib.error,
)
"""What Python's zipfile raises over damaged files."""
_BEFORE_ZIP = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
"""What `torch.save` began files with before torch 1.6: a pickled number."""
_BYTE_ORDER = "byteorder"
_ENCRYPTED = 1
"""The flag of a zip's record that asks for a password."""


class TensorRef(NamedTuple):
    """Where the elements of one tensor lie in its file."""

    file: Path
    offset: int
    """Of the first element, in bytes from the file's beginning."""
    dtype: DType
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    """In elements."""


class _Storage(NamedTuple):
    offset: int
    nbytes: int
    dtype: DType | None
    """None: untyped, so that the tensor on it has to say."""


class Archive:
    """One `torch.save` zip, at `offset` of a file."""

    def __init__(self, path: Path, *, offset: int = 0, length: int | None = None) -> None:
        self.path = path
        self._offset = offset
        self._length = path.stat().st_size - offset if length is None else length

    def read(self) -> Any:
        """The saved object, with a `TensorRef` for every tensor and stubs for foreign classes."""
        with self._opened() as (zipped, stream):
            records, places = _records(zipped), _Places(self.path, self._offset, zipped, stream)
            if "data.pkl" not in records:
                raise CheckpointError(f"{self.path}: not a file of torch.save (it has no data.pkl)")
            if _BYTE_ORDER in records:
                self._check_byte_order(zipped, records[_BYTE_ORDER])
            return read_pickle(
                self._content(zipped, records["data.pkl"]),
                path=self.path,
                names={
                    ("torch._utils", "_rebuild_tensor_v2"): partial(_rebuild_v2, self.path),
                    ("torch._utils", "_rebuild_tensor_v3"): partial(_rebuild, self.path),
                    ("torch._utils", "_rebuild_parameter"): lambda data, *_: data,
                    ("torch._utils", "_rebuild_parameter_with_state"): lambda data, *_: data,
                    ("torch._tensor", "_rebuild_from_type_v2"): lambda make, _, args, __: make(
                        *args
                    ),
                },
                persistent=lambda pid: self._storage(pid, records, places),
            )

    def first_damaged(self) -> str | None:
        """The first record whose CRC-32 is wrong; None when all are right."""
        with self._opened() as (zipped, _):
            try:
                return zipped.testzip()
            except NO_ZIP as fault:
                raise CheckpointError(f"{self.path}: is damaged ({fault})") from fault

    def _content(self, zipped: zipfile.ZipFile, record: zipfile.ZipInfo) -> bytes:
        if record.compress_type or record.flag_bits & _ENCRYPTED:
            how = "compressed" if record.compress_type else "encrypted"
            raise CheckpointError(f"{self.path}: is {how}, which torch.save never does")
        try:
            return zipped.read(record)
        except NO_ZIP as fault:
            raise CheckpointError(f"{self.path}: is damaged ({fault})") from fault

    def _check_byte_order(self, zipped: zipfile.ZipFile, record: zipfile.ZipInfo) -> None:
        order = self._content(zipped, record) if record.file_size < 10 else b"unknown"
        if order != b"little":
            raise CheckpointError(
                f"{self.path}: its numbers have the byte order {order.decode('latin-1')!r}, and "
                "only 'little' is read; load it with torch on a usual machine and save it again"
            )

    def checksums(self) -> list[tuple[int, int, int | None]]:
        """(first byte, byte after the last, CRC-32) of every storage, as places in the file.

        The CRC is None where torch was told not to compute any (`set_crc32_options(False)`).
        """
        with self._opened() as (zipped, stream):
            infos, places = zipped.infolist(), _Places(self.path, self._offset, zipped, stream)
            are_stored = any(info.CRC for info in infos)
            found = []
            for name, info in _records(zipped).items():
                if name.startswith("data/"):
                    start = places.payload_offset(info)
                    stop = start + info.file_size
                    found.append((start, stop, info.CRC if are_stored else None))
            return found

    @contextmanager
    def _opened(self) -> Iterator[tuple[zipfile.ZipFile, _Section]]:
        with self.path.open("rb") as file:
            section = _Section(file.fileno(), self._offset, self._length)
            try:
                zipped = zipfile.ZipFile(section)
            except NO_ZIP as fault:
                section.seek(0)
                if section.read(len(_BEFORE_ZIP)) == _BEFORE_ZIP:
                    raise CheckpointError(
                        f"{self.path}: is in torch's old format, from before its files were zips; "
                        "load it with torch and save it again (torch.save)"
                    ) from fault
                raise CheckpointError(
                    f"{self.path}: no whole torch.save zip at byte {self._offset} ({fault}); "
                    "the file is cut off or damaged"
                ) from fault
            with zipped:
                yield zipped, section

    def _storage(self, pid: Any, records: dict[str, zipfile.ZipInfo], places: _Places) -> _Storage:
        try:
            tag, storage_type, key, _, numel = pid
            record = records["data/" + key]
        except (TypeError, ValueError, KeyError):
            raise CheckpointError(
                f"{self.path}: no storage for the reference {brief(pid)}"
            ) from None
        dtype = BY_STORAGE.get((read_name(storage_type) or "").rpartition(".")[2])
        nbytes = numel * (dtype.itemsize if dtype else 1)
        if tag != "storage" or record.compress_type or nbytes > record.file_size:
            raise CheckpointError(
                f"{self.path}: storage {key} is {record.file_size} bytes, not the {nbytes} that "
                "its tensors need"
            )
        return _Storage(places.payload_offset(record), nbytes, dtype)


class _Places:
    """Where the payloads of a zip's records lie in the file that the zip is in."""

    def __init__(self, path: Path, offset: int, zipped: zipfile.ZipFile, stream: _Section) -> None:
        self._path, self._offset, self._stream = path, offset, stream
        starts = sorted(info.header_offset for info in zipped.infolist())
        self._ends = dict(zip(starts, [*starts[1:], zipped.start_dir], strict=True))

    def payload_offset(self, record: zipfile.ZipInfo) -> int:
        """CheckpointError where the record would reach into the next one."""
        self._stream.seek(record.header_offset)
        header = self._stream.read(_LOCAL_HEADER.size).ljust(_LOCAL_HEADER.size)
        signature, name_length, extra_length = _LOCAL_HEADER.unpack(header)
        within = record.header_offset + _LOCAL_HEADER.size + int(name_length) + int(extra_length)
        is_inside = within + record.file_size <= self._ends[record.header_offset]
        if signature != b"PK\x03\x04" or not is_inside:
            raise CheckpointError(
                f"{self._path}: no whole record at byte {self._offset + record.header_offset}; the "
                "file is damaged"
            )
        return self._offset + within


def _records(zipped: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    """The zip's records without the archive's own name before each."""
    return {info.filename.partition("/")[2]: info for info in zipped.infolist()}


def tensors_within(value: Any) -> Iterator[tuple[str, TensorRef]]:
    """All tensors that a value holds, however deep, also in objects that were not loaded; and the
    way to each (`0.weight`; empty where the value is one). What lies there twice comes once."""
    pending: deque[tuple[str, Any]] = deque([("", value)])
    seen: set[int] = set()
    while pending:
        way, each = pending.popleft()
        if isinstance(each, TensorRef):
            yield way, each
        elif id(each) not in seen:
            seen.add(id(each))
            inner = ((f"{way}.{key}" if way else key, item) for key, item in _inner(each))
            pending.extend(inner)


def _inner(value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        yield from ((key if isinstance(key, str) else brief(key), value[key]) for key in value)
    elif isinstance(value, (list, tuple, set, frozenset)):
        yield from ((str(number), each) for number, each in enumerate(value))
    elif isinstance(value, Inert):
        yield from _inner({**value.fields, "args": value.args, "items": value.items})
        yield "state", value.state


def _rebuild_v2(
    path: Path,
    storage: _Storage,
    storage_offset: int,
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    _requires_grad: bool = False,
    _hooks: Any = None,
    metadata: Any = None,
) -> TensorRef:
    """As v3, but without the dtype, which the storage has."""
    return _rebuild(path, storage, storage_offset, shape, strides, metadata=metadata)


def _rebuild(
    path: Path,
    storage: _Storage,
    storage_offset: int,
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    _requires_grad: bool = False,
    _hooks: Any = None,
    dtype_name: Any = None,
    metadata: Any = None,
) -> TensorRef:
    """What `torch._utils._rebuild_tensor_v3` would make."""
    if metadata:
        raise CheckpointError(
            f"{path}: a tensor is marked {brief(metadata)}, so its elements are others than those "
            "that are stored; save it without (resolve_conj(), resolve_neg(), cpu())"
        )
    dtype = storage.dtype or DTYPES.get((read_name(dtype_name) or "").removeprefix("torch."))
    if dtype is None:
        raise CheckpointError(f"{path}: a tensor of unknown type {brief(dtype_name)}")
    shape, strides = tuple(map(int, shape)), tuple(map(int, strides))
    _check_bounds(path, storage, storage_offset, shape, strides, dtype)
    return TensorRef(
        file=path,
        offset=storage.offset + storage_offset * dtype.itemsize,
        dtype=dtype,
        shape=shape,
        strides=strides,
    )


def _check_bounds(
    path: Path,
    storage: _Storage,
    storage_offset: int,
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    dtype: DType,
) -> None:
    if 0 in shape:
        return
    numbers = (storage_offset, *shape, *strides)
    last = sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    needed = (storage_offset + last + 1) * dtype.itemsize
    if min(numbers) < 0 or needed > storage.nbytes:
        raise CheckpointError(
            f"{path}: a tensor of shape {shape} reaches outside its storage of "
            f"{storage.nbytes} bytes"
        )


class _Section(io.RawIOBase):
    """Bytes [offset, offset + length) of an open file, as a file of their own."""

    def __init__(self, fd: int, offset: int, length: int) -> None:
        super().__init__()
        self._fd, self._offset, self._length = fd, offset, length
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._length}[whence]
        if base + offset < 0:
            raise OSError(f"seek to byte {base + offset}")
        self._at = base + offset
        return self._at

    def read(self, size: int | None = -1) -> bytes:
        left = max(0, self._length - self._at)
        wanted = left if size is None or size < 0 else min(size, left)
        data = os.pread(self._fd, wanted, self._offset + self._at)
        self._at += len(data)
        return data
