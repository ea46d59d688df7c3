"""The checksums of bytes that go by."""

from __future__ import annotations

import os

import xxhash

from bigtrain.checkpoint.crc32 import crc32

_BUFFER_BYTES = 1 << 20


class Digest:
    """xxh3-128 of all bytes so far, and their CRC-32 where someone needs it."""

    def __init__(self, data: bytes = b"", *, needs_crc: bool = False) -> None:
        self._xxh3 = xxhash.xxh3_128(data)
        self.needs_crc = needs_crc
        self.crc32 = 0

    def update(self, data: bytes | memoryview) -> None:
        """The next bytes."""
        self._xxh3.update(data)
        if self.needs_crc:
            self.crc32 = crc32(data, self.crc32)

    def copy(self) -> Digest:
        """Another one that has seen the same."""
        other = Digest(needs_crc=self.needs_crc)
        other._xxh3, other.crc32 = self._xxh3.copy(), self.crc32
        return other

    def hexdigest(self) -> str:
        """The xxh3, as `xxhsum -H2` prints it."""
        return self._xxh3.hexdigest()


def digest_range(fd: int, offset: int, nbytes: int, *digests: Digest) -> None:
    """Read a file's bytes into all of the digests; fewer where the file is shorter."""
    buffer = memoryview(bytearray(min(_BUFFER_BYTES, max(1, nbytes))))
    while nbytes > 0:
        count = os.preadv(fd, [buffer[:nbytes]], offset)
        if count == 0:
            break
        for each in digests:
            each.update(buffer[:count])
        offset += count
        nbytes -= count
