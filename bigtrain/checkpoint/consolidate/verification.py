"""Reads again what was written, and all that the source has checksums of."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from bigtrain.checkpoint.consolidate.digest import Digest, digest_range
from bigtrain.checkpoint.consolidate.journal import SpoiledError
from bigtrain.checkpoint.consolidate.layout import OutputFile
from bigtrain.checkpoint.consolidate.stream import WrittenFile
from bigtrain.checkpoint.source import Source
from bigtrain.checkpoint.verify import verify_checkpoint
from bigtrain.errors import CheckpointError


def check_source(source: Source) -> str:
    """Check every checksum that the source has, also of what was not read; what that was."""
    try:
        if source.is_own:
            verify_checkpoint(source.path, deep=True, lenient=True)
            return "all hashes of the manifest hold"
        count = source.check_all()
    except CheckpointError as fault:
        raise SpoiledError(str(fault)) from fault
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
    """Tensor by tensor, so that a fault has a name; then what lies between them."""
    whole, at = Digest(), 0
    for tensor, offset in zip(file.tensors, file.frame.offsets, strict=True):
        own = Digest()
        digest_range(fd, at, offset - at, whole)
        digest_range(fd, offset, tensor.nbytes, whole, own)
        if own.hexdigest() != expected.tensors[tensor.name]:
            raise _not_as_written(file, tensor.name)
        at = offset + tensor.nbytes
    size = os.fstat(fd).st_size
    digest_range(fd, at, size - at, whole)
    if whole.hexdigest() != expected.xxh3:
        raise _not_as_written(file, "what surrounds its tensors")


def _not_as_written(file: OutputFile, what: str) -> SpoiledError:
    return SpoiledError(
        f"{file.name}: {what} is not on the disk as it was written; the disk or the memory is "
        "faulty, and nothing was removed"
    )
