"""Reads again what was written, and all that the source has checksums of."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import xxhash

from bigtrain.checkpoint.consolidate.layout import OutputFile
from bigtrain.checkpoint.consolidate.stream import WrittenFile
from bigtrain.checkpoint.source import Source
from bigtrain.checkpoint.verify import verify_checkpoint
from bigtrain.errors import CheckpointError

_BUFFER_BYTES = 1 << 20


def check_source(source: Source) -> str:
    """Check every checksum that the source has, also of what was not read; what that was."""
    if source.is_own:
        verify_checkpoint(source.path, deep=True, lenient=True)
        return "all hashes of the manifest hold"
    count = source.check_all()
    if count == 0:
        return "it stores no checksums; that its pieces tile every tensor was checked"
    return f"the CRC-32 of all {count} records holds"


def read_back(files: Sequence[OutputFile], written: Sequence[WrittenFile], where: Path) -> None:
    """Raise unless the disk holds, tensor by tensor, what was handed to it."""
    for file, expected in zip(files, written, strict=True):
        fd = os.open(where / file.name, os.O_RDONLY)
        try:
            # From the disk, not from memory: it was synced, so the system lets go of it.
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            _read_back_file(file, expected, fd)
        finally:
            os.close(fd)


def _read_back_file(file: OutputFile, expected: WrittenFile, fd: int) -> None:
    if os.pread(fd, len(file.header), 0) != file.header:
        raise CheckpointError(f"{file.name}: its header is not on the disk as it was written")
    offset = len(file.header)
    for tensor in file.tensors:
        if _hash(fd, offset, tensor.nbytes) != expected.tensors[tensor.name]:
            raise CheckpointError(
                f"{file.name}: {tensor.name} is not on the disk as it was written; the disk or "
                "the memory is faulty, and nothing was removed"
            )
        offset += tensor.nbytes
    if os.fstat(fd).st_size != offset:
        raise CheckpointError(f"{file.name}: has {os.fstat(fd).st_size} bytes instead of {offset}")


def _hash(fd: int, offset: int, nbytes: int) -> str:
    hasher = xxhash.xxh3_128()
    buffer = memoryview(bytearray(_BUFFER_BYTES))
    while nbytes:
        count = os.preadv(fd, [buffer[:nbytes]], offset)
        if count == 0:
            break
        hasher.update(buffer[:count])
        offset += count
        nbytes -= count
    return hasher.hexdigest()
