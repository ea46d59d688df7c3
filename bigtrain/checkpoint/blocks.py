"""Files hashed in blocks of 4 MiB: while they are written, and again as they are read.

A reader that wants a few bytes checks only the blocks that hold them. xxh3 is not meant against
forgery, but against bits that flip, writes that were lost and files that are not what they were.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import xxhash

from bigtrain.checkpoint.witness import Record, RecordSource, record_holds
from bigtrain.errors import CheckpointError

BLOCK_BYTES = 4 << 20
HASH_BYTES = 16
_WRITE_BUFFER_BYTES = 1 << 20
_OPEN_FILES = 64
"""Kept open at once while reading: far below any system's limit."""


def hash_bytes(data: bytes | bytearray | memoryview) -> bytes:
    """xxh3-128 of `data`."""
    return xxhash.xxh3_128_digest(data)


@dataclass(frozen=True, kw_only=True)
class FileDigest:
    """What a file held when it was written."""

    size: int
    blocks: bytes
    """xxh3-128 of every block, one after another."""

    @property
    def root(self) -> bytes:
        """One hash for the whole file."""
        return hash_bytes(self.size.to_bytes(8, "little") + self.blocks)

    def block(self, number: int) -> bytes:
        """The hash of one block."""
        return self.blocks[number * HASH_BYTES : (number + 1) * HASH_BYTES]


class BlockHasher:
    """Hashes a stream block by block."""

    def __init__(self) -> None:
        self.size = 0
        self._blocks = bytearray()
        self._open = xxhash.xxh3_128()

    def update(self, data: memoryview) -> None:
        """Take in the next bytes."""
        while data.nbytes:
            room = BLOCK_BYTES - self.size % BLOCK_BYTES
            piece = data[:room]
            self._open.update(piece)
            self.size += piece.nbytes
            if piece.nbytes == room:
                self._blocks += self._open.digest()
                self._open = xxhash.xxh3_128()
            data = data[room:]

    def digest(self) -> FileDigest:
        """Of all that was taken in so far."""
        tail = self._open.digest() if self.size % BLOCK_BYTES else b""
        return FileDigest(size=self.size, blocks=bytes(self._blocks) + tail)


class HashingFile:
    """A new file that is hashed while it is written, and is on the disk once it is closed.

    Serves as the stream of `torch.save`. Use it in a `with`; `digest` is there afterwards.
    """

    digest: FileDigest

    def __init__(self, path: Path) -> None:
        # Only the last directory: a staging that was taken away must not come back empty.
        path.parent.mkdir(exist_ok=True)
        self.path = path
        self._file = path.open("xb", buffering=_WRITE_BUFFER_BYTES)
        self._hasher = BlockHasher()

    def write(self, data: bytes | memoryview, /) -> int:
        """Append `data`; how many bytes that were."""
        view = memoryview(data).cast("B") if len(data) else memoryview(b"")
        self._file.write(view)
        self._hasher.update(view)
        return view.nbytes

    def tell(self) -> int:
        """How many bytes were written."""
        return self._hasher.size

    def flush(self) -> None:
        """Hand what is buffered to the system."""
        self._file.flush()

    def __enter__(self) -> HashingFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, fault: BaseException | None, _: TracebackType | None
    ) -> None:
        try:
            if fault is None:
                self._file.flush()
                os.fsync(self._file.fileno())
                self.digest = self._hasher.digest()
        finally:
            self._file.close()


def hash_file(path: Path, *, sync: bool = False) -> FileDigest:
    """The digest of a file that is there already; with `sync`, it is then also on the disk."""
    hasher = BlockHasher()
    buffer = memoryview(bytearray(_WRITE_BUFFER_BYTES))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            hasher.update(buffer[:count])
        if sync:
            os.fsync(file.fileno())
    return hasher.digest()


class FileReader:
    """Reads byte ranges of a file, each block checked against `digest` when it is first touched."""

    def __init__(
        self, path: Path, digest: FileDigest | None, find_record: RecordSource | None = None
    ) -> None:
        self.path = path
        self.digest = digest
        self._find_record = find_record
        self._held: set[Record] = set()
        try:
            self._fd = os.open(path, os.O_RDONLY)
        except OSError as fault:
            raise CheckpointError(f"{path}: can't be opened: {fault.strerror}") from fault
        self.size = os.fstat(self._fd).st_size
        self._trusted: set[int] = set()
        if digest is not None and digest.size != self.size:
            self.close()
            raise CheckpointError(
                f"{path}: has {self.size} bytes, but {digest.size} were written; the checkpoint "
                "is damaged"
            )

    def read(self, offset: int, length: int) -> bytes:
        """Bytes [offset, offset + length)."""
        buffer = bytearray(length)
        self.read_into(offset, memoryview(buffer))
        return bytes(buffer)

    def read_into(self, offset: int, out: memoryview) -> None:
        """Fill `out` with the bytes from `offset` on."""
        if self.digest is None:
            self._check_record(offset)
            self._fill(offset, out)
            return
        stop = offset + out.nbytes
        for number in range(offset // BLOCK_BYTES, -(-stop // BLOCK_BYTES)):
            begin = max(offset, number * BLOCK_BYTES)
            end = min(stop, (number + 1) * BLOCK_BYTES)
            self._read_checked(number, begin, out[begin - offset : end - offset])

    def check(self) -> None:
        """Raise unless every block is as it was written."""
        buffer = memoryview(bytearray(min(BLOCK_BYTES, max(1, self.size))))
        for begin in range(0, self.size, BLOCK_BYTES):
            self.read_into(begin, buffer[: min(BLOCK_BYTES, self.size - begin)])

    def close(self) -> None:
        """Safe to call twice."""
        if self._fd >= 0:
            os.close(self._fd)
        self._fd = -1

    def _check_record(self, offset: int) -> None:
        """Check all of the record that holds this byte, when it is first read from."""
        record = self._find_record(self.path, offset) if self._find_record else None
        if record is None or not record.is_checked or record in self._held:
            return
        if not record_holds(self.path, record):
            raise CheckpointError(
                f"{self.path}: bytes {record.start} to {record.stop} are not those that were "
                "written (their checksum differs); the checkpoint is damaged, use another one"
            )
        self._held.add(record)

    def _read_checked(self, number: int, begin: int, out: memoryview) -> None:
        if number in self._trusted:
            self._fill(begin, out)
            return
        first = number * BLOCK_BYTES
        whole = min(BLOCK_BYTES, self.size - first)
        block = out if out.nbytes == whole else memoryview(bytearray(max(0, whole)))
        self._fill(first, block)
        assert self.digest is not None
        if hash_bytes(block) != self.digest.block(number):
            raise CheckpointError(
                f"{self.path}: bytes {first} to {first + whole} are not those that were written "
                "(their hash differs); the checkpoint is damaged, use another one"
            )
        self._trusted.add(number)
        if block is not out:
            out[:] = block[begin - first : begin - first + out.nbytes]

    def _fill(self, offset: int, out: memoryview) -> None:
        while out.nbytes:
            try:
                count = os.preadv(self._fd, [out], offset)
            except OSError as fault:
                raise CheckpointError(
                    f"{self.path}: can't be read at byte {offset}: {fault.strerror}; use another "
                    "checkpoint"
                ) from fault
            if count == 0:
                raise CheckpointError(
                    f"{self.path}: ends at byte {offset}, {out.nbytes} bytes too early; the file "
                    "is cut off"
                )
            offset += count
            out = out[count:]


class FilePool:
    """Readers of a checkpoint's files, opened when they are first asked for."""

    def __init__(
        self,
        digests: Mapping[Path, FileDigest] | None = None,
        *,
        find_record: RecordSource | None = None,
        absent: Mapping[Path, str] | None = None,
    ) -> None:
        """`absent`: files that are known not to be here, each with what to say of it."""
        self._absent = absent or {}
        self._digests = dict(digests or {})
        self._find_record = find_record
        self._open: OrderedDict[Path, FileReader] = OrderedDict()

    def knows(self, path: Path) -> bool:
        """Whether the checkpoint's manifest has this file."""
        return path in self._digests

    def reader(self, path: Path) -> FileReader:
        """The reader of `path`; another may be closed for it."""
        if path in self._open:
            self._open.move_to_end(path)
            return self._open[path]
        if path in self._absent:
            raise CheckpointError(self._absent[path])
        reader = self._open[path] = FileReader(path, self._digests.get(path), self._find_record)
        while len(self._open) > _OPEN_FILES:
            self._open.popitem(last=False)[1].close()
        return reader

    def close(self) -> None:
        """Close all files. Safe to call twice."""
        while self._open:
            self._open.popitem()[1].close()
