"""Files are written right whatever the places, lengths and addresses of what goes into them."""

from __future__ import annotations

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
