"""The agent of one node of several: the local agent, whose store and end belong to all nodes."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from bigtrain.cluster import failure
from bigtrain.cluster.agent import Agent, _end_store
from bigtrain.cluster.environment import Place
from bigtrain.cluster.fork_client import ForkServer
from bigtrain.cluster.lifeline import Conclude, Ending, Lifeline, Verdict
from bigtrain.cluster.rendezvous import Joined
from bigtrain.cluster.signals import SignalInbox
from bigtrain.cluster.supervisor import FAILURE_GRACE_S, Outcome
from bigtrain.cluster.time_limit import TimeLimit
from bigtrain.console import Console
from bigtrain.errors import BigtrainError
from bigtrain.plan import RunPlan


class NodeAgent(Agent):
    """Runs this node's ranks of one attempt, after the nodes have met, and ends when all nodes do.

    `host`, `node_rank`: this node's name and place in the attempt. The first node looks at the
    clock for all: ranks that are told to stop one node later than others would train on a step that
    these no longer take.
    """

    def __init__(
        self,
        plan: RunPlan,
        *,
        plan_path: Path,
        console: Console,
        inherited: Mapping[str, str],
        host: str,
        node_rank: int,
        joined: Joined,
        lifeline: Lifeline,
        conclude: Conclude,
        read_limit: Callable[[], TimeLimit | None] | None = None,
    ) -> None:
        super().__init__(
            plan,
            plan_path=plan_path,
            console=console,
            inherited=inherited,
            host=host,
            node_rank=node_rank,
            read_limit=read_limit if node_rank == 0 else None,
        )
        self._joined = joined
        self._conclude = conclude
        self._run_is_over = contextlib.ExitStack()
        self.verdict: Verdict | None = None
        """What the attempt as a whole ended with; None before."""
        self._over = threading.Event()
        self._told_to_end = threading.Event()
        self._lifeline = lifeline
        lifeline.begin(on_end=self._end_ranks, on_notice=super()._give_notice)

    def run(self) -> int:
        """The exit code of the attempt, the same on all nodes."""
        ending = Ending(code=1, failure=f"the agent on {self._host} broke down", time=time.time())
        try:
            ending = Ending(code=super().run())
        except BigtrainError as error:
            text = f"{self._host}: {error}"
            ending = Ending(code=error.exit_code, failure=text, time=time.time())
        finally:
            self._over.set()
            if self.verdict is None:  # it never came to a round of ranks
                self.verdict = self._leave(ending)
        return self.verdict.code

    # Where the local agent's way differs

    def _start_store(self, server: ForkServer, stack: contextlib.ExitStack) -> Place:
        """The first node serves on the socket at which the nodes met, until all have left. The
        socket stays open here, for the next attempt's store."""
        place = Place(
            node_rank=self._node_rank,
            store_host=self._joined.address,
            store_port=self._joined.port,
        )
        listener = self._joined.listener
        if listener is None:
            return place
        life_end, life = os.pipe()
        with self._logs.store.open("ab") as log:
            files = (log.fileno(), listener.fileno(), life_end)
            pid = server.start_store(host=place.store_host, port=place.store_port, files=files)
        os.close(life_end)
        self._run_is_over.callback(_end_store, pid=pid, life=life)
        self._log.write(f"store is pid {pid} at {place.store_host}:{place.store_port}")
        return place

    def _run_round(self, server: ForkServer, inbox: SignalInbox, *, restarts: int) -> Outcome:
        with self._run_is_over:
            outcome = super()._run_round(server, inbox, restarts=restarts)
            self._over.set()
            self.verdict = self._leave(self._ending_of(outcome))
        self._log.write(f"the run ended with exit code {self.verdict.code}")
        if self.verdict.cause:
            self._log.write(self.verdict.cause)
        return dataclasses.replace(outcome, exit_code=self.verdict.code)

    def _give_notice(self) -> None:
        """To the ranks of all nodes."""
        self._lifeline.give_notice()

    def _leave(self, ending: Ending) -> Verdict:
        return self._lifeline.leave(ending, conclude=self._conclude)

    def _ending_of(self, outcome: Outcome) -> Ending:
        left = outcome.failure
        if left is None:
            return Ending(code=outcome.exit_code)
        text = failure.describe(left)
        self._log.write(text)
        when = left.report.time if left.report else left.time
        return Ending(
            code=outcome.exit_code,
            failure=text,
            time=when,
            from_outside=left.status < 0 and left.status != -signal.SIGABRT,
        )

    def _tell(self, outcome: Outcome) -> None:
        """Nothing: what the run ended with is told once, by the first node."""

    def _show(self, rank: int, event: dict[str, Any]) -> None:
        if event["kind"] == "failed":
            self._lifeline.warn()
        super()._show(rank, event)

    def _end_ranks(self) -> None:
        """Called in the lifeline's thread; signals are what the supervisor listens to. Again until
        it is heard: it may come before the supervisor is there."""
        self._told_to_end.set()
        os.kill(os.getpid(), signal.SIGTERM)
        while not self._over.wait(FAILURE_GRACE_S):
            os.kill(os.getpid(), signal.SIGTERM)

    def _is_futile(self) -> bool:
        return self._told_to_end.is_set()
