"""Files are written right whatever the places, lengths and addresses of what goes into them."""

from __future__ import annotations

import errno
import os
import random
import threading
from pathlib import Path

import pytest

from bigtrain.checkpoint.consolidate.digest import Digest
from bigtrain.checkpoint.consolidate.outlet import ALIGNMENT, Outlet, aligned_buffer
from bigtrain.checkpoint.consolidate.sink import BUFFER_BYTES, Sink


@pytest.mark.parametrize("offset", [0, 1, ALIGNMENT, 3 * ALIGNMENT + 17])
@pytest.mark.parametrize("nbytes", [0, 1, ALIGNMENT, 5 * ALIGNMENT - 1, (1 << 20) + 8])
def test_all_bytes_come_to_their_place(tmp_path: Path, offset: int, nbytes: int) -> None:
    data = random.Random(nbytes).randbytes(nbytes)
    buffer = aligned_buffer(nbytes or 1)[:nbytes]
    buffer[:] = data
    outlet = Outlet(tmp_path / "file")
    outlet.write(buffer, offset)
    outlet.close()
    assert (tmp_path / "file").read_bytes() == (bytes(offset) + data if nbytes else b"")


def test_a_buffer_that_the_disk_cannot_take_directly_goes_through_the_page_cache(
    tmp_path: Path,
) -> None:
    """The kernel refuses addresses in the middle of a sector; some filesystems refuse more."""
    data = random.Random(1).randbytes(2 * ALIGNMENT)
    buffer = aligned_buffer(4 * ALIGNMENT)[1 : 1 + 2 * ALIGNMENT]
    buffer[:] = data
    outlet = Outlet(tmp_path / "file")
    outlet.write(buffer, ALIGNMENT)
    outlet.write(buffer, 0)
    outlet.close()
    assert (tmp_path / "file").read_bytes() == data + data[ALIGNMENT:]


@pytest.mark.parametrize("offset", [0, 8, ALIGNMENT - 8, BUFFER_BYTES + 800])
def test_a_sink_writes_in_order_and_says_synced_only_what_is_whole(
    tmp_path: Path, offset: int
) -> None:
    data = random.Random(offset).randbytes(5 * BUFFER_BYTES + 4321)
    synced: list[int] = []
    digest = Digest()
    outlet = Outlet(tmp_path / "file")
    with Sink(outlet, offset=offset, digest=digest, on_synced=synced.append) as sink:
        sink.put(data)
    outlet.close()
    assert (tmp_path / "file").read_bytes() == bytes(offset) + data
    assert digest.hexdigest() == Digest(data).hexdigest()
    assert synced == sorted(synced)
    assert synced[-1] == offset + len(data)


def test_a_write_that_fails_ends_the_sink_and_all_its_threads(tmp_path: Path) -> None:
    before = threading.active_count()
    outlet = Outlet(tmp_path / "file")
    os.close(outlet.fd)  # every write fails from here on, as on a disk that is gone
    outlet.fd = os.open(tmp_path / "file", os.O_RDONLY)
    with (
        pytest.raises(OSError, match="Bad file descriptor"),
        Sink(outlet, offset=8, digest=Digest(), on_synced=lambda _: None) as sink,
    ):
        for _ in range(64):
            sink.put(bytes(BUFFER_BYTES))
    outlet.close()
    assert threading.active_count() == before


def started(tmp_path: Path, start: int, stop: int) -> Path:
    """A file that held more than what it is to be continued from."""
    path = tmp_path / "file"
    path.write_bytes(b"a" * (stop + 100))
    outlet = Outlet(path)
    outlet.begin(start, stop)
    outlet.close()
    return path


@pytest.mark.parametrize("start", [0, 8, ALIGNMENT, 3 * ALIGNMENT + 17])
@pytest.mark.parametrize("stop", [0, 17, 9 << 20])
def test_what_was_written_stays_and_nothing_behind_it(
    start: int, stop: int, tmp_path: Path
) -> None:
    stop += start
    content = started(tmp_path, start, stop).read_bytes()
    assert content in (b"a" * start, b"a" * start + bytes(stop - start))


def test_room_is_set_apart_without_writing_to_it(tmp_path: Path) -> None:
    path = started(tmp_path, 17, 9 << 20)
    if path.stat().st_size == 17:
        pytest.skip("this filesystem sets no room apart")
    assert path.stat().st_blocks * 512 >= (9 << 20) - ALIGNMENT
    with path.open("rb") as file, pytest.raises(OSError, match="No such device or address"):
        os.lseek(file.fileno(), 4 << 20, os.SEEK_DATA)


def test_where_the_c_library_would_write_zeros_it_does_so_to_one_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def emulated(fd: int, offset: int, nbytes: int) -> None:
        asked.append(nbytes)
        os.pwrite(fd, bytes(nbytes), offset)

    monkeypatch.setattr(os, "posix_fallocate", emulated)
    assert started(tmp_path, 17, 9 << 20).read_bytes() == b"a" * 17
    assert asked == [ALIGNMENT]


@pytest.mark.parametrize("number", [1, 2])
def test_too_little_room_is_left_to_those_who_write(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, asked = os.posix_fallocate, []

    def full(fd: int, offset: int, nbytes: int) -> None:
        asked.append(nbytes)
        if len(asked) == number:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(fd, offset, nbytes)

    monkeypatch.setattr(os, "posix_fallocate", full)
    assert started(tmp_path, 17, 9 << 20).read_bytes() == b"a" * 17
