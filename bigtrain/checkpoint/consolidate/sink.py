"""Bytes on their way to a file, through threads that check, write and sync them.

The worker fills buffers. Meanwhile the checker does what was noted of the ones before (checksums)
and hashes them, three writers keep the disk busy with those before them, and the syncer has them on
the disk for good, so that the last sync has little left to do.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from types import TracebackType
from typing import NamedTuple

from bigtrain.checkpoint.consolidate.digest import Digest
from bigtrain.checkpoint.consolidate.outlet import ALIGNMENT, Outlet, aligned_buffer

BUFFER_BYTES = 1 << 20
"""Larger ones leave the processor's cache and are slower."""
_BUFFERS = 8
_WRITERS = 3
_SYNC_BYTES = 256 << 20


class _Filled(NamedTuple):
    data: memoryview | None
    notes: list[Callable[[], object]]


class _Checked(NamedTuple):
    data: memoryview
    offset: int


class Sink:
    """The end of a file that grows from `offset` on. Use it in a `with`.

    On leaving without an error, all is written and on the disk.
    """

    def __init__(
        self,
        outlet: Outlet,
        *,
        offset: int,
        digest: Digest,
        on_synced: Callable[[int], None],
    ) -> None:
        self._outlet = outlet
        self._digest = digest
        self._on_synced = on_synced
        self._begun = offset
        self._written = _Reached(offset)
        self._synced = offset
        self._free: queue.SimpleQueue[memoryview] = queue.SimpleQueue()
        self._full: queue.SimpleQueue[_Filled | None] = queue.SimpleQueue()
        self._checked: queue.SimpleQueue[_Checked | None] = queue.SimpleQueue()
        self._notes: list[Callable[[], object]] = []
        for _ in range(_BUFFERS):
            self._free.put(aligned_buffer(BUFFER_BYTES))
        self._buffer: memoryview | None = None
        self._filled = 0
        # The first ends where a page does, the others are whole pages; no element is cut in two.
        self._room = -offset % ALIGNMENT or BUFFER_BYTES
        self._fault: BaseException | None = None
        self._wake = threading.Event()
        self._closing = False
        self._threads = [
            threading.Thread(target=self._guarded, args=(run,), name=f"sink-{name}", daemon=True)
            for name, run in (
                ("check", self._check_all),
                *[("write", self._write_all)] * _WRITERS,
                ("sync", self._sync_all),
            )
        ]
        for thread in self._threads:
            thread.start()

    def space(self, most: int) -> memoryview:
        """Room for up to `most` bytes, at least one; fill it from the front, then `take` them."""
        if self._buffer is None:
            self._buffer, self._filled = self._free.get(), 0
        if self._fault is not None:
            raise self._fault
        return self._buffer[self._filled : min(self._room, self._filled + most)]

    def take(self, count: int) -> None:
        """The first `count` bytes of the last `space` are filled."""
        assert self._buffer is not None
        self._filled += count
        if self._filled == self._room:
            self._hand_over()

    def note(self, task: Callable[[], object]) -> None:
        """To be done by the checker, in order, before the buffer of the next `take` is written."""
        self._notes.append(task)

    def put(self, data: bytes) -> None:
        """A few bytes that are at hand."""
        left = memoryview(data)
        while left:
            space = self.space(len(left))
            space[:] = left[: space.nbytes]
            self.take(space.nbytes)
            left = left[space.nbytes :]

    def __enter__(self) -> Sink:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, fault: BaseException | None, _: TracebackType | None
    ) -> None:
        if fault is None:
            self._hand_over()
        self._full.put(None)
        *earlier, syncer = self._threads
        for thread in earlier:
            thread.join()
        self._closing = True
        self._wake.set()
        syncer.join()
        if fault is None and self._fault is not None:
            raise self._fault

    def _hand_over(self) -> None:
        data = None if self._buffer is None else self._buffer[: self._filled]
        self._full.put(_Filled(data, self._notes))
        self._buffer, self._notes = None, []
        self._room = BUFFER_BYTES

    def _guarded(self, run: Callable[[], None]) -> None:
        try:
            run()
        except BaseException as fault:  # the worker raises it
            self._fault = self._fault or fault
            for _ in range(_BUFFERS):  # it may be waiting for a buffer
                self._free.put(aligned_buffer(BUFFER_BYTES))

    def _check_all(self) -> None:
        offset = self._begun
        try:
            while (filled := self._full.get()) is not None:
                for task in filled.notes:
                    task()
                if filled.data is not None:
                    self._digest.update(filled.data)
                    self._checked.put(_Checked(filled.data, offset))
                    offset += filled.data.nbytes
        finally:
            for _ in range(_WRITERS):
                self._checked.put(None)

    def _write_all(self) -> None:
        while (checked := self._checked.get()) is not None:
            data, offset = checked
            self._outlet.write(data, offset)
            reached = self._written.add(offset, data.nbytes)
            self._free.put(memoryview(data.obj))
            if reached - self._synced >= _SYNC_BYTES:
                self._wake.set()

    def _sync_all(self) -> None:
        closing = False
        while not closing:
            self._wake.wait()
            self._wake.clear()
            closing, reached = self._closing, self._written.value
            self._outlet.sync()
            self._synced = reached
            self._on_synced(reached)


class _Reached:
    """Up to where a file is written without a gap, by threads that overtake each other."""

    def __init__(self, value: int) -> None:
        self.value = value
        self._guard = threading.Lock()
        self._ahead: dict[int, int] = {}

    def add(self, offset: int, count: int) -> int:
        """These bytes are written too; up to where all are."""
        with self._guard:
            self._ahead[offset] = offset + count
            while self.value in self._ahead:
                self.value = self._ahead.pop(self.value)
            return self.value
