"""The connections over which the nodes met, kept: so that all of them end together.

Without it, nodes would learn of each other's end from hanging collectives, and from Slurm, whose
srun leaves with the highest of the nodes' exit codes (so that 143 of a node that was told to stop
hides 85 or 3 of the node that knew why) and notices a machine that is gone after minutes.

    a node's ranks are failing      → "failing" to the first node
    its ranks have all left         → "left", with its exit code and what failed
    the first node to all others:     "end" when a node fails or is lost; "leave" when all have
                                      left; "notice" when the time limit is near

A lost node is noticed by the kernel's keepalive within about 25 s, a dead agent at once. Where the
run has spare nodes, "leave" may name the attempt that it goes on with: then the next round begins,
over the same connections.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import selectors
import socket
import threading
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass
from typing import Any, TypeAlias

from bigtrain.cluster import rendezvous_wire
from bigtrain.cluster.attempts import Attempt
from bigtrain.cluster.rendezvous import Joined, Seat
from bigtrain.cluster.rendezvous_wire import LineReader
from bigtrain.cluster.signals import EXIT_AGAIN

_LEAVE_WITHIN_S = 45.0
"""From the moment that nodes are told to end: longer than the ranks' usual grace."""
_BEYOND_GRACE_S = 15.0


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
    successor: Mapping[str, Any] | None = None
    """The attempt that the nodes that are left go on with at once (`bigtrain.cluster.attempts`)."""

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


Conclude: TypeAlias = Callable[[Verdict, Collection[int]], Verdict]
"""On the first node, what is to follow: given how a round ended and the nodes that are alive, the
verdict that all are told. Called before any other node knows, and may leave."""


class Lifeline:
    """This node's connections to the others, for rounds of ranks: each is `begin` and `leave` on
    the nodes that have a place in it, and `stand_by` on the others. `close` once, at the end.
    """

    def __init__(
        self, seat: Seat, joined: Joined, *, places: Collection[int], grace_s: float = 0.0
    ) -> None:
        """`grace_s`: how long ranks have to leave when they are told to, where that was said."""
        self._seat = seat
        self._leave_within_s = max(_LEAVE_WITHIN_S, grace_s + _BEYOND_GRACE_S)
        self._connections = dict(joined.connections)
        self._readers = dict(joined.readers)
        self._changed = threading.Condition()
        self._gone: set[int] = set()
        """Nodes whose connection has ended, or that did not answer in time."""
        self._verdict: Verdict | None = None
        self._is_over = False
        self._on_end: Callable[[], None] | None = None
        self._on_notice: Callable[[], None] | None = None
        self._start_over(places)
        self._wake_end, self._wake = os.pipe()
        self._watcher = threading.Thread(target=self._watch, name="lifeline", daemon=True)
        self._watcher.start()

    @property
    def has_lost_head(self) -> bool:
        """Whether this is another node than the first, and the first is gone."""
        return 0 in self._lost

    def begin(
        self, *, on_end: Callable[[], None], on_notice: Callable[[], None] = lambda: None
    ) -> None:
        """This node's ranks are about to be started. `on_end` is called in a thread, at most once
        in this round, when they must go because of what happened on another node; `on_notice` when
        they are to save and leave, to be started again."""
        with self._changed:
            self._on_end, self._on_notice = on_end, on_notice
            is_late = self._told_to_end
        if is_late:
            threading.Thread(target=on_end, name="lifeline-end", daemon=True).start()

    def warn(self) -> None:
        """Tell the others at once that ranks of this node are failing."""
        if self._seat.node_rank == 0:
            self._end_all(tell_self=False)
        else:
            self._send(0, {"failing": True})

    def give_notice(self) -> None:
        """On the first node: the ranks of all nodes are to save and leave, to be started again."""
        for rank in self._others():
            self._send(rank, {"notice": True})
        self._take_notice()

    def leave(self, ending: Ending, *, conclude: Conclude) -> Verdict:
        """Report this node's end and wait for all others'; what the round as a whole ended with."""
        with self._changed:
            self._endings[self._seat.node_rank] = ending
        if self._seat.node_rank == 0:
            return self._leave_as_head(ending, conclude)
        self._send(0, {"left": asdict(ending)})
        return self._hear_verdict({self._seat.node_rank: ending})

    def stand_by(self) -> Verdict:
        """Wait, without a place in this round, for what it ends with."""
        return self._hear_verdict({})

    def hurry(self) -> None:
        """If this node's ranks have left, wait no longer than a node may take to end its own."""
        with self._changed:
            if self._seat.node_rank in self._endings:
                self._set_limit()

    def close(self) -> None:
        """Let go of the other nodes."""
        os.write(self._wake, b"\n")
        self._watcher.join()
        os.close(self._wake)
        os.close(self._wake_end)
        for connection in self._connections.values():
            connection.close()

    # The main thread's side

    def _leave_as_head(self, ending: Ending, conclude: Conclude) -> Verdict:
        if ending.failure is not None:
            self._end_all(tell_self=False)
        with self._changed:
            self._wait_until(self._all_have_left)
            for rank in self._others() - set(self._endings) - self._gone:
                self._give_up(rank)
            verdict = judge(self._endings, self._lost)
            alive = {0, *self._connections} - self._gone
        verdict = conclude(verdict, alive)
        if verdict.successor is None:
            self._is_over = True
        else:
            with self._changed:
                self._start_over(Attempt.from_message(verdict.successor).places)
        for rank in self._connections:
            told = verdict if rank in alive else dataclasses.replace(verdict, successor=None)
            self._send(rank, {"leave": asdict(told)})
        if verdict.successor is not None and self._lost:
            self._end_all(tell_self=True)
        return verdict

    def _hear_verdict(self, endings: Mapping[int, Ending]) -> Verdict:
        with self._changed:
            self._wait_until(lambda: self._verdict is not None or 0 in self._lost)
            verdict, self._verdict = self._verdict, None
            return verdict or judge(endings, self._lost)

    def _wait_until(self, holds: Callable[[], bool]) -> None:
        while not holds():
            left = None if self._limit is None else self._limit - time.monotonic()
            if left is not None and left <= 0:
                return
            self._changed.wait(left)

    def _all_have_left(self) -> bool:
        return self._others() <= set(self._endings) | self._gone

    def _others(self) -> set[int]:
        return {rank for rank in self._places if rank != self._seat.node_rank}

    def _give_up(self, rank: int) -> None:
        """A node is gone, or does not end. What had failed before that is not its doing."""
        self._gone.add(rank)
        if not any(ending.failure for ending in self._endings.values()):
            self._lost[rank] = self._seat.name_of(rank)

    def _start_over(self, places: Collection[int]) -> None:
        """A round begins, in which some may be lost from the start."""
        self._places = frozenset(places)
        self._endings: dict[int, Ending] = {}
        self._lost = {r: self._seat.name_of(r) for r in self._places & self._gone}
        self._on_end = self._on_notice = None
        self._told_to_end = False
        self._told_others = False
        self._limit: float | None = None

    def _set_limit(self) -> None:
        self._limit = self._limit or time.monotonic() + self._leave_within_s
        self._changed.notify_all()

    # The thread's side

    def _watch(self) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(self._wake_end, selectors.EVENT_READ)
            for rank, connection in self._connections.items():
                reader = self._readers[rank]
                selector.register(connection, selectors.EVENT_READ, (rank, connection, reader))
                for message in reader.waiting:  # it came right behind the end of the meeting
                    self._take(rank, message)
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
        if rank in self._gone:
            return  # it was given up, and the round that it speaks of is over
        if "end" in message:
            self._end_self()
        elif "notice" in message:
            self._take_notice()
        elif "failing" in message:
            self._end_all(tell_self=True, but=rank)
        elif "leave" in message:
            self._take_verdict(Verdict.from_message(message["leave"]))
        elif "left" in message:
            self._take_ending(rank, Ending(**message["left"]))

    def _take_verdict(self, verdict: Verdict) -> None:
        with self._changed:
            self._verdict = verdict
            if verdict.successor is None:
                self._is_over = True
            else:  # here, and not where it is waited for: the next message may be of that round
                self._start_over(Attempt.from_message(verdict.successor).places)
            self._changed.notify_all()

    def _take_notice(self) -> None:
        with self._changed:
            on_notice = self._on_notice
        if on_notice is not None:
            on_notice()

    def _take_ending(self, rank: int, ending: Ending) -> None:
        with self._changed:
            self._endings[rank] = ending
            self._changed.notify_all()
        if ending.failure is not None:
            self._end_all(tell_self=True, but=rank)
        elif ending.code != 0:
            with self._changed:
                self._set_limit()  # it was told to stop, and the others will have been, too

    def _lose(self, rank: int) -> None:
        with self._changed:
            has_mattered = rank in self._places or rank == 0
            if rank in self._endings or self._is_over or not has_mattered:
                self._gone.add(rank)
                return
            if self._seat.node_rank == 0:
                self._give_up(rank)
            else:
                self._lost[rank] = self._seat.name_of(rank)
                self._gone.add(rank)
            self._changed.notify_all()
        if self._seat.node_rank == 0:
            self._end_all(tell_self=True)
        else:
            self._end_self()

    def _end_all(self, *, tell_self: bool, but: int | None = None) -> None:
        """The round can't go on: every node is to end its ranks, `but` one that is at it."""
        with self._changed:
            self._set_limit()
            if self._told_others:
                return
            self._told_others = True
            others = self._others()
        for rank in others - {but}:
            self._send(rank, {"end": True})
        if tell_self:
            self._end_self()

    def _end_self(self) -> None:
        with self._changed:
            if self._told_to_end or self._seat.node_rank in self._endings:
                return
            self._told_to_end = True
            on_end = self._on_end
        if on_end is not None:
            on_end()

    def _send(self, rank: int, message: Mapping[str, Any]) -> None:
        with contextlib.suppress(OSError):  # that it is gone is noticed where it is read
            self._connections[rank].sendall(rendezvous_wire.encode(message))
