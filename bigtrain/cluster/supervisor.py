"""Watches the ranks of one node from their birth until the last one has left.

One loop waits for signals, events and the passing of time. A rank's end is the kernel's word
(`waitid`), looked at without reaping: until the end of the round the rank's number and its
process group's stay taken, so that a signal sent to them can't reach a stranger.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bigtrain.cluster import failure, linux
from bigtrain.cluster.failure import RankExit
from bigtrain.cluster.follow import LogFollower
from bigtrain.cluster.signals import EXIT_AGAIN, SignalInbox

STOP_GRACE_S = 30.0
"""From a signal to stop until SIGKILL: a checkpoint may be on its way to the disk."""
FAILURE_GRACE_S = 10.0
"""The same once a rank has failed: the others can't save without it."""
LINGER_S = 10.0
"""How long a rank that announced an exception may take to leave."""

_POLL_S = 0.1
_STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@dataclass(kw_only=True)
class LiveRank:
    """A rank's process, as the agent knows it."""

    rank: int
    pid: int
    events: int
    """The reading end of its event pipe, not blocking."""
    log: Path
    error_path: Path
    exit: RankExit | None = None
    announced_at: float | None = None
    """Monotonic time at which it said that an exception ends it."""
    ended_by_us: bool = False
    unread: bytes = b""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a round ended."""

    failure: RankExit | None
    """The rank that failed first; None when none failed by itself."""
    stopped_by: int | None
    """The signal that was passed on to the ranks and ended them."""
    exit_code: int


class Supervisor:
    """`watch` once; then the outcome is known and no process of the round is left."""

    def __init__(
        self,
        *,
        host: str,
        ranks: Mapping[int, LiveRank],
        inbox: SignalInbox,
        on_event: Callable[[int, dict[str, Any]], None],
        say: Callable[[str], None],
        follower: LogFollower | None,
        is_futile: Callable[[], bool] = lambda: False,
        stop_grace_s: float = STOP_GRACE_S,
    ) -> None:
        """`is_futile`: whether the run has failed elsewhere, so that a SIGTERM comes from there.
        `stop_grace_s`: from a SIGTERM of anybody else until the ranks are killed."""
        self._host = host
        self._ranks = ranks
        self._inbox = inbox
        self._on_event = on_event
        self._say = say
        self._follower = follower
        self._is_futile = is_futile
        self._stop_grace_s = stop_grace_s
        self._is_terminated = False
        self._stopped_by: int | None = None
        self._stopped_at = 0.0
        self._kill_at: float | None = None
        self._kill_why = ""
        self._failed = False
        self._selector = selectors.DefaultSelector()

    def watch(self) -> Outcome:
        """Returns when every rank has left, by itself or by force."""
        self._selector.register(self._inbox, selectors.EVENT_READ, self._pass_signals_on)
        for rank in self._ranks.values():
            reader = _reader(self._read_events, rank)
            self._selector.register(rank.events, selectors.EVENT_READ, reader)
        try:
            while self._alive():
                for key, _ in self._selector.select(self._patience()):
                    key.data()
                self._look_around()
            return self._outcome()
        finally:
            self._clean_up()

    def _alive(self) -> list[LiveRank]:
        return [rank for rank in self._ranks.values() if rank.exit is None]

    def _patience(self) -> float | None:
        """Seconds to wait for something to happen; a rank's end always wakes the inbox."""
        timed = self._kill_at is not None or any(r.announced_at for r in self._alive())
        return _POLL_S if timed or self._follower is not None else None

    def _look_around(self) -> None:
        """What is due now: ranks that have left, time limits, rank 0's output."""
        left = [rank for rank in self._alive() if self._notice_exit(rank)]
        for rank in left:  # all were noticed before any of the others is told to leave
            self._end_the_others(rank)
        now = time.monotonic()
        if self._kill_at is not None and now >= self._kill_at and self._alive():
            self._kill(self._kill_why)
        for rank in self._alive():
            if rank.announced_at is not None and now >= rank.announced_at + LINGER_S:
                rank.ended_by_us = True
                linux.kill_group(rank.pid)
        if self._follower is not None:
            self._follower.poll()

    def _notice_exit(self, rank: LiveRank) -> bool:
        state = os.waitid(os.P_PID, rank.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        if state is None:
            return False
        self._read_events(rank)  # what it said before it left
        if self._follower is not None and (state.si_code != os.CLD_EXITED or state.si_status):
            self._follower.end_at_traceback()
        exited = state.si_code == os.CLD_EXITED
        rank.exit = RankExit(
            rank=rank.rank,
            host=self._host,
            status=state.si_status if exited else -state.si_status,
            time=time.time(),
            log=rank.log,
            report=failure.read(rank.error_path),
            ended_by_us=rank.ended_by_us,
        )
        return True

    def _end_the_others(self, rank: LiveRank) -> None:
        """Without one rank the others wait for ever in their next collective."""
        left = rank.exit
        if self._failed or left is None or not left.is_bad:
            return
        if self._is_stop(left):
            # They are leaving too, and may still be saving.
            self._kill_within(self._stop_grace_s, self._why_stopped(self._stop_grace_s))
            return
        self._failed = True
        linux.kill_group(rank.pid)  # its data workers
        self._signal_all(signal.SIGTERM, ended_by_us=True)
        self._kill_within(FAILURE_GRACE_S, "still there after the grace period")

    def _is_stop(self, left: RankExit) -> bool:
        """Whether a rank left because it was told to, and not by a fault of its own."""
        if self._stopped_by is None:
            return False
        if left.report is not None:
            # A rank that is interrupted takes its peers' connections with it: what they raise
            # after that is no failure. A trainer that can't save when it is told to stop is one.
            after = left.report.time >= self._stopped_at
            return after and (self._stopped_by == signal.SIGINT or self._died_of_stop())
        return left.ended_by_us or left.status in self._stop_statuses() | {EXIT_AGAIN}

    def _died_of_stop(self) -> bool:
        deadly = {status for status in self._stop_statuses() if status < 0}
        return any(rank.exit and rank.exit.status in deadly for rank in self._ranks.values())

    def _stop_statuses(self) -> set[int]:
        asked = {int(self._stopped_by or 0), int(signal.SIGTERM)}
        return {-number for number in asked} | {128 + number for number in asked}

    def _pass_signals_on(self) -> None:
        for number in self._inbox.drain():
            if number == signal.SIGINT and self._stopped_by == signal.SIGINT:
                self._kill("interrupted twice")
                continue
            if number == signal.SIGINT:
                self._say("interrupted: the ranks stop without a save (Ctrl-C again: kill them)")
                if self._follower is not None:
                    self._follower.end_at_traceback()
            self._stopped_by, self._stopped_at = number, time.time()
            self._signal_all(number)
            if number in _STOPPING:
                patience = self._patience_after(number)
                self._kill_within(patience, self._why_stopped(patience))
            self._is_terminated = self._is_terminated or number == signal.SIGTERM

    def _patience_after(self, number: int) -> float:
        if number != signal.SIGTERM:
            return STOP_GRACE_S
        return FAILURE_GRACE_S if self._is_futile() else self._stop_grace_s

    def _signal_all(self, number: int, *, ended_by_us: bool = False) -> None:
        """To the ranks alone: their data workers are theirs to end."""
        for rank in self._alive():
            rank.ended_by_us = rank.ended_by_us or ended_by_us
            os.kill(rank.pid, number)

    def _kill(self, why: str) -> None:
        names = ", ".join(str(rank.rank) for rank in self._alive())
        self._say(f"killing rank {names}: {why}")
        for rank in self._alive():
            rank.ended_by_us = True
            linux.kill_group(rank.pid)
        self._kill_at = None

    def _kill_within(self, seconds: float, why: str) -> None:
        limit = time.monotonic() + seconds
        if self._kill_at is None or limit < self._kill_at:
            self._kill_at, self._kill_why = limit, why

    def _why_stopped(self, seconds: float) -> str:
        hint = " (cluster.stop_grace_s)" if seconds == self._stop_grace_s else ""
        return f"still there {seconds:.0f} s after the signal to stop{hint}"

    def _read_events(self, rank: LiveRank) -> None:
        while True:
            try:
                data = os.read(rank.events, 65_536)
            except BlockingIOError:
                return
            if not data:
                with contextlib.suppress(KeyError):
                    self._selector.unregister(rank.events)
                return
            *lines, rank.unread = (rank.unread + data).split(b"\n")
            for line in lines:
                self._take_event(rank, line)

    def _take_event(self, rank: LiveRank, line: bytes) -> None:
        try:
            event = json.loads(line)
        except ValueError:
            return
        if not isinstance(event, dict) or not isinstance(event.get("kind"), str):
            return  # not ours: the pipe is open to all that the rank runs
        if event["kind"] == "failed" and rank.announced_at is None:
            rank.announced_at = time.monotonic()
            if self._follower is not None:
                self._follower.end_at_traceback()
        self._on_event(rank.rank, event)

    def _outcome(self) -> Outcome:
        exits = [rank.exit for rank in self._ranks.values() if rank.exit is not None]
        faults = [left for left in exits if not self._is_stop(left)]
        first = failure.first_failure(faults)
        if first is not None:
            return Outcome(failure=first, stopped_by=self._stopped_by, exit_code=first.exit_code)
        return Outcome(
            failure=None, stopped_by=self._stopped_by, exit_code=self._code_without_failure(exits)
        )

    def _code_without_failure(self, exits: list[RankExit]) -> int:
        """0, or what the ranks made of the signal that was passed on to them."""
        codes = [left.exit_code for left in exits if left.status != 0]
        if self._stopped_by == signal.SIGINT:
            return 128 + signal.SIGINT
        if self._stopped_by and (self._died_of_stop() or any(e.ended_by_us for e in exits)):
            is_notice = self._stopped_by in (signal.SIGUSR1, signal.SIGUSR2)
            return EXIT_AGAIN if is_notice else 128 + self._stopped_by
        if codes and self._is_terminated:
            return 128 + signal.SIGTERM  # also of ranks that were leaving to be run again
        return codes[0] if codes else 0

    def _clean_up(self) -> None:
        """Leave nothing: processes that ranks left behind, zombies, pipes."""
        for rank in self._ranks.values():
            linux.kill_group(rank.pid)
        for rank in self._ranks.values():
            os.waitpid(rank.pid, 0)
            os.close(rank.events)
        self._selector.close()


def _reader(read: Callable[[LiveRank], None], rank: LiveRank) -> Callable[[], None]:
    return lambda: read(rank)
