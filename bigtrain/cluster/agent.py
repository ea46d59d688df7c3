"""Runs the ranks of one node: imports once, starts them, and starts them again after a failure."""

from __future__ import annotations

import contextlib
import math
import os
import select
import signal
import socket
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from bigtrain.cluster import ending, environment, failure, linux, time_limit
from bigtrain.cluster.agent_log import AgentLog
from bigtrain.cluster.environment import Place
from bigtrain.cluster.follow import LogFollower
from bigtrain.cluster.fork_client import ForkServer, Preloaded
from bigtrain.cluster.layout import NodeLogs
from bigtrain.cluster.rank import RankJob
from bigtrain.cluster.signals import EXIT_AGAIN, SignalInbox
from bigtrain.cluster.supervisor import (
    STOP_GRACE_S,
    LiveRank,
    Outcome,
    Supervisor,
)
from bigtrain.cluster.time_limit import TimeLimit
from bigtrain.console import Console, Event
from bigtrain.errors import LaunchError
from bigtrain.plan import RunPlan

_NOTICES = (signal.SIGUSR1, signal.SIGUSR2)
"""That the run is about to be stopped, and should be started again."""
_SLOW_IMPORT_S = 15.0
_STORE_LEAVES_WITHIN_S = 5.0


class Agent:
    """`run` once, in the main thread of a process that has no other children."""

    def __init__(
        self,
        plan: RunPlan,
        *,
        plan_path: Path,
        console: Console,
        inherited: Mapping[str, str],
        host: str,
        node_rank: int = 0,
        read_limit: Callable[[], TimeLimit | None] | None = None,
    ) -> None:
        """`read_limit` tells when the run has to be gone, where nobody else gives notice of it."""
        self._plan = plan
        self._plan_path = plan_path
        self._console = console
        self._host = host
        self._node_rank = node_rank
        self._read_limit = read_limit
        self._logs = NodeLogs.of(
            output_dir=plan.output_dir, attempt=plan.attempt, node_rank=node_rank, host=host
        )
        self._environment = environment.for_node(plan, inherited=inherited, logs=self._logs)
        # In a step of Slurm's, KillWait and GraceTime say how long a save may take.
        usual = math.inf if "SLURM_STEP_ID" in inherited else STOP_GRACE_S
        self._stop_grace_s = usual if plan.stop_grace_s is None else float(plan.stop_grace_s)
        self._server: ForkServer | None = None
        self.saved: str | None = None
        """The last checkpoint that the ranks have told of."""
        self._preloaded = False

    def run(self) -> int:
        """The exit code of the run, once nothing of it is left. LaunchError if it can't start."""
        self._logs.directory.mkdir(parents=True, exist_ok=True)
        self._log = AgentLog(self._logs.agent)
        linux.adopt_orphans()
        try:
            with SignalInbox() as inbox:
                return self._run_rounds(inbox)
        except LaunchError as error:
            self._log.write(str(error))
            raise
        finally:
            if self._server is not None:
                self._server.close()
            _reap_strays()
            self._log.close()

    def _run_rounds(self, inbox: SignalInbox) -> int:
        """One round, and another after each failure for as long as restarts are left."""
        for restarts in range(self._plan.max_restarts + 1):
            server = self._living_server()
            stopped_by = self._wait_for_preload(server, inbox)
            if stopped_by is not None:
                name = failure.signal_name(stopped_by)
                self._say(f"stopped by {name} before the ranks were started")
                return EXIT_AGAIN if stopped_by in _NOTICES else 128 + stopped_by
            outcome = self._run_round(server, inbox, restarts=restarts)
            self._tell(outcome)
            is_asked_for = outcome.failure is None or outcome.stopped_by is not None
            if is_asked_for or restarts == self._plan.max_restarts:
                break
            self._say(f"restarting all ranks ({restarts + 1} of {self._plan.max_restarts})")
        return outcome.exit_code

    # The fork server

    def _living_server(self) -> ForkServer:
        if self._server is not None and self._server.alive:
            return self._server
        fresh = self._plan.start_method == "fresh"
        self._server = ForkServer(
            environment=self._environment,
            working_dir=self._plan.working_dir,
            log=self._logs.fork_server,
            kind=self._plan.kind,
            source=self._plan.source,
            modules=() if fresh else self._plan.preload,
        )
        self._preloaded = False
        self._log.write(f"fork server is pid {self._server.pid}")
        return self._server

    def _wait_for_preload(self, server: ForkServer, inbox: SignalInbox) -> int | None:
        """None when the server is ready to fork; the signal's number if one came first."""
        patience: float | None = _SLOW_IMPORT_S
        files = [server.control.fileno(), inbox.fileno()]
        while not self._preloaded:
            readable, _, _ = select.select(files, [], [], patience)
            if stopping := set(inbox.drain()):
                return min(stopping)
            if server.control.fileno() in readable:
                self._note(server.ready())
                self._preloaded = True
            elif not readable:
                self._say(f"still importing {', '.join(self._plan.preload)}")
                patience = None
        return None

    def _note(self, preloaded: Preloaded) -> None:
        self._log.write(f"preload took {preloaded.seconds:.2f} s, {preloaded.threads} thread(s)")
        for module, why in preloaded.skipped.items():
            self._log.write(f"preload left out {module}: {why}")

    # One round of ranks

    def _run_round(self, server: ForkServer, inbox: SignalInbox, *, restarts: int) -> Outcome:
        with contextlib.ExitStack() as stack:
            place = self._start_store(server, stack)
            follower = self._follower(stack)
            ranks = self._start_ranks(server, place, restarts)
            supervisor = Supervisor(
                host=self._host,
                ranks=ranks,
                inbox=inbox,
                on_event=self._show,
                say=self._say,
                follower=follower,
                is_futile=self._is_futile,
                stop_grace_s=self._stop_grace_s,
            )
            with self._watch_on_limit():
                outcome = supervisor.watch()
        server.forget_children()
        return outcome

    def _watch_on_limit(self) -> contextlib.AbstractContextManager[None]:
        if self._read_limit is None:
            return contextlib.nullcontext()

        def notify(why: str) -> None:
            self._say(why)
            self._give_notice()

        return time_limit.watched(self._read_limit, Path(self._plan.output_dir), notify=notify)

    def _give_notice(self) -> None:
        """Called in another thread; as if Slurm itself had sent its notice."""
        os.kill(os.getpid(), signal.SIGUSR2)

    def _is_futile(self) -> bool:
        """Whether what these ranks do has lost its point: never, on one machine."""
        return False

    def _start_store(self, server: ForkServer, stack: contextlib.ExitStack) -> Place:
        """Bind a port of the system's choice and have it served until `stack` is closed."""
        listener = socket.create_server(("127.0.0.1", 0), backlog=1024)
        host, port = listener.getsockname()
        life_end, life = os.pipe()
        with listener, self._logs.store.open("ab") as log:
            files = (log.fileno(), listener.fileno(), life_end)
            pid = server.start_store(host=host, port=port, files=files)
        os.close(life_end)
        stack.callback(_end_store, pid=pid, life=life)
        self._log.write(f"store is pid {pid} at {host}:{port}")
        return Place(node_rank=self._node_rank, store_host=host, store_port=port)

    def _start_ranks(self, server: ForkServer, place: Place, restarts: int) -> dict[int, LiveRank]:
        procs = self._plan.topology.procs_per_node
        started = time.monotonic()
        ranks: dict[int, LiveRank] = {}
        try:
            for local_rank in range(procs):
                rank = self._start_rank(server, place, local_rank, restarts)
                ranks[rank.rank] = rank
                self._log.write(f"rank {rank.rank} is pid {rank.pid}")
        except LaunchError:
            for rank in ranks.values():
                linux.kill_group(rank.pid)
                os.waitpid(rank.pid, 0)
            raise
        self._log.write(f"started {procs} rank(s) in {time.monotonic() - started:.3f} s")
        return ranks

    def _start_rank(
        self, server: ForkServer, place: Place, local_rank: int, restarts: int
    ) -> LiveRank:
        rank = self._node_rank * self._plan.topology.procs_per_node + local_rank
        log, error_path = self._logs.rank(rank), self._logs.error(rank)
        _set_aside(error_path, restarts)
        variables = environment.for_rank(
            self._plan,
            plan_path=str(self._plan_path),
            local_rank=local_rank,
            place=place,
            logs=self._logs,
            restarts=restarts,
        )
        events, events_input = os.pipe()
        for end in (events, events_input):
            os.set_blocking(end, False)
        try:
            with log.open("ab") as output:
                pid = server.start_rank(
                    self._job(rank, error_path),
                    environment=variables,
                    fresh=self._plan.start_method == "fresh",
                    files=(output.fileno(), events_input),
                )
        finally:
            os.close(events_input)
        return LiveRank(rank=rank, pid=pid, events=events, log=log, error_path=error_path)

    def _job(self, rank: int, error_path: Path) -> RankJob:
        return RankJob(
            rank=rank,
            host=self._host,
            kind=self._plan.kind,
            source=self._plan.source,
            script_args=self._plan.script_args,
            error_path=str(error_path),
        )

    # What people are told

    def _follower(self, stack: contextlib.ExitStack) -> LogFollower | None:
        """A user's script speaks to its user: rank 0's output goes to the console."""
        if self._plan.kind != "script" or self._node_rank != 0:
            return None
        follower = LogFollower(self._logs.rank(0), show=self._console.output)
        stack.callback(follower.close)
        return follower

    def _show(self, rank: int, event: dict[str, Any]) -> None:
        kind = event.pop("kind")
        if kind == "saved":
            self.saved = str(event.get("path"))
        if kind in ("warning", "error", "failed"):
            self._log.write(f"rank {rank}: {kind} {event.get('text', '')}")
        self._console.show(Event(node_rank=self._node_rank, rank=rank, kind=kind, fields=event))

    def _tell(self, outcome: Outcome) -> None:
        if outcome.failure is not None:
            text = failure.describe(outcome.failure)
            self._log.write(text)
            self._console.fail(text, details=failure.details(outcome.failure))
        elif outcome.stopped_by is not None and outcome.exit_code:
            name = failure.signal_name(outcome.stopped_by)
            self._say(f"stopped by {name}; {ending.how_to_go_on(self._plan, saved=self.saved)}")
        self._log.write(f"the round ended with exit code {outcome.exit_code}")

    def _say(self, text: str) -> None:
        self._log.write(text)
        self._console.say(text)


def _set_aside(report: Path, restarts: int) -> None:
    """A report of the round before must not be taken for one of this round."""
    with contextlib.suppress(FileNotFoundError):
        report.rename(report.with_suffix(f".before-restart-{restarts}.json"))


def _end_store(*, pid: int, life: int) -> None:
    """The pipe's end tells the store to leave; it is killed if it does not."""
    os.close(life)
    limit = time.monotonic() + _STORE_LEAVES_WITHIN_S
    while os.waitpid(pid, os.WNOHANG) == (0, 0):
        if time.monotonic() > limit:
            linux.kill_group(pid)
            os.waitpid(pid, 0)
            return
        time.sleep(0.005)


def _reap_strays() -> None:
    """Descendants that were adopted and have ended: processes that outlived their rank."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG) != (0, 0):
            pass
