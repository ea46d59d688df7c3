"""A file that is written past the page cache, where its filesystem can do that.

What is copied through the page cache is copied twice and synced at the end, and pushes out what
others keep there. Written directly, a buffer goes to the disk from where it lies: half the
processor's time, and the last sync has little left to do.
"""

from __future__ import annotations

import errno
import mmap
import os
from pathlib import Path

ALIGNMENT = 4096
"""Bytes: of places, lengths and addresses of what is written directly, on every disk."""

_WORTH_BYTES = 8 << 20
"""Less is written before it matters."""


def aligned_buffer(nbytes: int) -> memoryview:
    """Zeros, from the beginning of a page on."""
    return memoryview(mmap.mmap(-1, nbytes))


def write_all(fd: int, data: bytes | memoryview, offset: int) -> None:
    """All of `data`, from `offset` on: a disk that fills writes a part, and says so at the next."""
    left = memoryview(data)
    while left:
        written = os.pwrite(fd, left, offset)
        offset += written
        left = left[written:]


class Outlet:
    """One file, open for reading and writing. Several threads may write different parts of it."""

    def __init__(self, path: Path) -> None:
        self.fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        self._direct = _open_direct(path)
        self._is_direct = self._direct is not None

    def begin(self, start: int, stop: int) -> None:
        """Cut the file off at `start`, and have room up to `stop` set apart where that is possible.

        A file that grows is written by one thread at a time (ext4, xfs); into room that is there
        already, several write at once.
        """
        os.truncate(self.fd, start)
        try:
            _set_apart(self.fd, start, stop)
        except OSError:  # too little room, which whoever writes there is told
            os.truncate(self.fd, start)

    def write(self, data: memoryview, offset: int) -> None:
        """All of `data`, from `offset` on; on the disk after the next sync."""
        done = 0
        if self._is_direct and offset % ALIGNMENT == 0:
            done = self._write_directly(data[: data.nbytes - data.nbytes % ALIGNMENT], offset)
        write_all(self.fd, data[done:], offset + done)

    def sync(self) -> None:
        """What was written so far survives a loss of power afterwards."""
        os.fdatasync(self.fd)

    def close(self) -> None:
        """No thread may be writing any more."""
        os.close(self.fd)
        if self._direct is not None:
            os.close(self._direct)

    def _write_directly(self, data: memoryview, offset: int) -> int:
        """How many of the bytes; the rest has to go through the page cache."""
        assert self._direct is not None
        done = 0
        while done < data.nbytes and done % ALIGNMENT == 0:
            try:
                done += os.pwrite(self._direct, data[done:], offset + done)
            except OSError as fault:
                if fault.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
                    raise
                self._is_direct = False  # the filesystem took the flag, but wants other alignment
                break
        return done


def _set_apart(fd: int, start: int, stop: int) -> None:
    """Where a filesystem can't, the C library writes zeros everywhere: slow, and for nothing.

    So the last page is tried first: room that was only set apart holds no data.
    """
    if not hasattr(os, "posix_fallocate") or stop - start < _WORTH_BYTES:  # macOS has none
        return
    last = stop // ALIGNMENT * ALIGNMENT - ALIGNMENT
    os.posix_fallocate(fd, last, ALIGNMENT)
    try:
        os.lseek(fd, last, os.SEEK_DATA)
    except OSError as fault:
        if fault.errno != errno.ENXIO:
            raise
        os.posix_fallocate(fd, start, stop - start)
    else:
        os.truncate(fd, start)


def _open_direct(path: Path) -> int | None:
    flag = getattr(os, "O_DIRECT", None)  # macOS has none
    if flag is None:
        return None
    try:
        return os.open(path, os.O_WRONLY | flag)
    except OSError:  # it knows no such thing
        return None
