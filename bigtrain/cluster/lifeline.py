"""The connections over which the nodes met, kept: so that all of them end together.

Without it, nodes would learn of each other's end from hanging collectives, and from Slurm, whose
srun leaves with the highest of the nodes' exit codes (so that 143 of a node that was told to stop
hides 85 or 3 of the node that knew why) and notices a machine that is gone after minutes.

    a node's ranks are failing      → "failing" to the first node
    its ranks have all left         → "left", with its exit code and what failed
    the first node to all others:     "end" when a node fails or is lost; "leave" when all have left

A lost node is noticed by the kernel's keepalive within about 25 s, a dead agent at once.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import socket
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from bigtrain.cluster import rendezvous_wire
from bigtrain.cluster.rendezvous import Joined, Seat
from bigtrain.cluster.rendezvous_wire import LineReader

EXIT_AGAIN = 85
"""Run me again: what was saved last is to be gone on from."""
_LEAVE_WITHIN_S = 45.0
"""From the moment that nodes are told to end: longer than the ranks' own grace."""


@dataclass(frozen=True, kw_only=True)
class Ending:
    """How the ranks of one node ended."""

    code: int
    failure: str | None = None
    """What went wrong there, in words; None when its ranks were done, or were told to stop."""
    time: float = 0.0
    """When, by that node's clock: the first failure is the cause of the others."""
    from_outside: bool = False
    """Whether a signal from outside was the failure: never the consequence of another one."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """How the run ended, the same on every node."""

    code: int
    cause: str | None
    lost: tuple[str, ...] = ()
    """Names of nodes that vanished."""

    @classmethod
    def from_message(cls, message: Mapping[str, Any]) -> Verdict:
        return cls(**{**message, "lost": tuple(message["lost"])})


def judge(endings: Mapping[int, Ending], lost: Mapping[int, str]) -> Verdict:
    """The run's end from that of its nodes. `lost`: node rank → its name, for those that vanished.

    A node that vanished takes its ranks' connections with it, so whatever failed elsewhere is a
    consequence. Else the first failure counts; else the wish to be run again; else any code.
    """
    if lost:
        names = tuple(lost[rank] for rank in sorted(lost))
        text = f"{', '.join(names)} vanished: the machine, its network or its agent is gone"
        return Verdict(code=EXIT_AGAIN, cause=text, lost=names)
    failed = [ending for ending in endings.values() if ending.failure is not None]
    if failed:
        first = min(failed, key=lambda ending: (not ending.from_outside, ending.time))
        return Verdict(code=first.code or 1, cause=first.failure)
    codes = {ending.code for ending in endings.values()} - {0}
    return Verdict(code=EXIT_AGAIN if EXIT_AGAIN in codes else max(codes, default=0), cause=None)


class Lifeline:
    """This node's connections to the others. `leave` once, at the end.

    `on_end` is called in a thread, at most once, when this node's ranks must go because of what
    happened on another node.
    """

    def __init__(self, seat: Seat, joined: Joined, *, on_end: Callable[[], None]) -> None:
        self._seat = seat
        self._connections = dict(joined.connections)
        self._on_end = on_end
        self._changed = threading.Condition()
        self._endings: dict[int, Ending] = {}
        self._lost: dict[int, str] = {}
        self._verdict: Verdict | None = None
        self._told_to_end = False
        self._told_others = False
        self._limit: float | None = None
        self._wake_end, self._wake = os.pipe()
        self._watcher = threading.Thread(target=self._watch, name="lifeline", daemon=True)
        self._watcher.start()

    @property
    def has_lost_head(self) -> bool:
        """Whether this is another node than the first, and the first is gone."""
        return 0 in self._lost

    def warn(self) -> None:
        """Tell the others at once that ranks of this node are failing."""
        if self._seat.node_rank == 0:
            self._end_all(tell_self=False)
        else:
            self._send(0, {"failing": True})

    def leave(self, ending: Ending, *, record: Callable[[Verdict], None]) -> Verdict:
        """Report this node's end and wait for all others'; what the run as a whole ended with.

        On the first node, `record` is called with it before any other node knows, and may leave.
        """
        if self._seat.node_rank == 0:
            verdict = self._leave_as_head(ending, record)
        else:
            verdict = self._leave_as_guest(ending)
        os.write(self._wake, b"\n")
        self._watcher.join()
        for connection in self._connections.values():
            connection.close()
        return verdict

    def hurry(self) -> None:
        """Wait no longer than a node may take to end its ranks."""
        with self._changed:
            self._limit = self._limit or time.monotonic() + _LEAVE_WITHIN_S
            self._changed.notify_all()

    # The main thread's side

    def _leave_as_head(self, ending: Ending, record: Callable[[Verdict], None]) -> Verdict:
        with self._changed:
            self._endings[0] = ending
        if ending.failure is not None:
            self._end_all(tell_self=False)
        with self._changed:
            self._wait_until(self._all_have_left)
            for rank in set(self._connections) - set(self._endings) - set(self._lost):
                self._lost[rank] = self._seat.name_of(rank)
            verdict = judge(self._endings, self._lost)
        record(verdict)
        for rank in self._connections:
            self._send(rank, {"leave": asdict(verdict)})
        return verdict

    def _leave_as_guest(self, ending: Ending) -> Verdict:
        with self._changed:
            self._endings[self._seat.node_rank] = ending
        self._send(0, {"left": asdict(ending)})
        with self._changed:
            self._wait_until(lambda: self._verdict is not None or 0 in self._lost)
            if self._verdict is not None:
                return self._verdict
            return judge({self._seat.node_rank: ending}, self._lost)

    def _wait_until(self, holds: Callable[[], bool]) -> None:
        while not holds():
            left = None if self._limit is None else self._limit - time.monotonic()
            if left is not None and left <= 0:
                return
            self._changed.wait(left)

    def _all_have_left(self) -> bool:
        return set(self._connections) <= set(self._endings) | set(self._lost)

    # The thread's side

    def _watch(self) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(self._wake_end, selectors.EVENT_READ)
            for rank, connection in self._connections.items():
                reader = LineReader(limit=rendezvous_wire.LARGEST_LINE)
                selector.register(connection, selectors.EVENT_READ, (rank, connection, reader))
            while True:
                for key, _ in selector.select():
                    if key.data is None:
                        return
                    if not self._read(*key.data):
                        selector.unregister(key.fileobj)

    def _read(self, rank: int, connection: socket.socket, reader: LineReader) -> bool:
        """Take what a node has said; False when it is gone."""
        try:
            data = connection.recv(65_536)
            if not data:
                raise ConnectionError
            for message in reader.feed(data):
                self._take(rank, message)
            return True
        except (OSError, ValueError, KeyError, TypeError):
            self._lose(rank)
            return False

    def _take(self, rank: int, message: Mapping[str, Any]) -> None:
        if "end" in message:
            self._end_self()
        elif "failing" in message:
            self._end_all(tell_self=True, but=rank)
        elif "leave" in message:
            with self._changed:
                self._verdict = Verdict.from_message(message["leave"])
                self._changed.notify_all()
        elif "left" in message:
            ending = Ending(**message["left"])
            with self._changed:
                self._endings[rank] = ending
                self._changed.notify_all()
            if ending.failure is not None:
                self._end_all(tell_self=True, but=rank)
            elif ending.code != 0:
                self.hurry()  # it was told to stop, and the others will have been, too

    def _lose(self, rank: int) -> None:
        with self._changed:
            if rank in self._endings or self._verdict is not None:
                return
            self._lost[rank] = self._seat.name_of(rank)
            self._changed.notify_all()
        if self._seat.node_rank == 0:
            self._end_all(tell_self=True)
        else:
            self._end_self()

    def _end_all(self, *, tell_self: bool, but: int | None = None) -> None:
        """The run can't go on: every node is to end its ranks, `but` one that is at it."""
        self.hurry()
        with self._changed:
            if self._told_others:
                return
            self._told_others = True
        for rank in self._connections:
            if rank != but:
                self._send(rank, {"end": True})
        if tell_self:
            self._end_self()

    def _end_self(self) -> None:
        with self._changed:
            if self._told_to_end or self._seat.node_rank in self._endings:
                return
            self._told_to_end = True
        self._on_end()

    def _send(self, rank: int, message: Mapping[str, Any]) -> None:
        with contextlib.suppress(OSError):  # that it is gone is noticed where it is read
            self._connections[rank].sendall(rendezvous_wire.encode(message))
