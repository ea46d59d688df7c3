"""A run on several machines: what each of them does, once it knows which one it is.

    meet (rendezvous) → agree (agreement) → this attempt's plan → run (node_agent) → one verdict
                                                  ↑                                    │
                                                  └─ a spare node for one that was lost ┘

Whoever starts the nodes (Slurm, or a person on each machine) gives every one its `Seat`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import signal
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from bigtrain.cluster import agreement, attempts, ending, rendezvous, threads
from bigtrain.cluster.agreement import StorageToken
from bigtrain.cluster.attempts import Attempt
from bigtrain.cluster.lifeline import Lifeline, Verdict
from bigtrain.cluster.node_agent import NodeAgent
from bigtrain.cluster.rendezvous import Joined, Member, Seat
from bigtrain.cluster.rendezvous_address import interface_of
from bigtrain.cluster.signals import EXIT_AGAIN
from bigtrain.cluster.time_limit import TimeLimit
from bigtrain.console import Console, Event
from bigtrain.errors import ConfigError
from bigtrain.plan import RunPlan

_STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
_GPU_RECORDS = Path("/proc/driver/nvidia/gpus")


def as_it_is(verdict: Verdict) -> Verdict:
    """The run's end where nobody has anything to add."""
    return verdict


def launch(
    plan: RunPlan,
    plan_path: Path,
    *,
    seat: Seat,
    console: Console,
    inherited: Mapping[str, str],
    again: bool = False,
    record: Callable[[Verdict], Verdict] = as_it_is,
    read_limit: Callable[[], TimeLimit | None] | None = None,
) -> int:
    """Run this node's share of `plan`; returns the run's exit code, the same on all nodes.

    Every node calls it in its main thread, with the plan as it was made, and where that lies or is
    to lie. Nodes beyond those that the plan is for are spare. `again`: the same run was started
    before, so this is a new attempt that goes on from the last checkpoint. `record` is called on
    the first node with the run's end, before any node leaves, and may make another one of it; where
    the first node is lost, on those that are left. `read_limit` tells when the run has to be gone:
    it saves and leaves ahead of that. LaunchError, on all nodes, when they can't start together.
    """
    if plan.max_restarts:
        raise ConfigError(
            "max_restarts restarts the ranks of one machine; a run over several nodes is started "
            "again as a whole (cluster.slurm.max_requeues)"
        )
    if seat.num_nodes < plan.topology.nodes:
        raise ConfigError(
            f"the plan is for {plan.topology.nodes} nodes; there are {seat.num_nodes}"
        )
    seat = dataclasses.replace(seat, num_needed=plan.topology.nodes)
    with _StopSignals() as signals:
        try:
            joined = _meet(plan, plan_path, seat=seat, console=console, again=again)
            run = _NodeRun(
                plan=plan,
                plan_path=plan_path,
                seat=seat,
                joined=joined,
                console=console,
                inherited=inherited,
                record=record,
                read_limit=read_limit,
            )
            signals.then(run.lifeline.hurry)
        except _StoppedError as stop:
            verdict = Verdict(code=stop.exit_code, cause=None)
            if seat.node_rank == 0:
                verdict = record(verdict)
                _tell(verdict, console)
            return verdict.code
        return run.run()


@dataclass(kw_only=True)
class _NodeRun:
    """This node's share of a run whose nodes have met: of one attempt, and of another for as long
    as spare nodes make up for those that are lost. The fields are the arguments of `launch`."""

    plan: RunPlan
    plan_path: Path
    seat: Seat
    joined: Joined
    console: Console
    inherited: Mapping[str, str]
    record: Callable[[Verdict], Verdict]
    read_limit: Callable[[], TimeLimit | None] | None

    def __post_init__(self) -> None:
        self._attempt = Attempt.from_message(self.joined.decision)
        self._saved: str | None = None
        grace_s = float(self.plan.stop_grace_s or 0)
        self.lifeline = Lifeline(
            self.seat, self.joined, places=self._attempt.places, grace_s=grace_s
        )

    def run(self) -> int:
        """The exit code of the run, the same on all nodes."""
        try:
            verdict = self._take_part()
            while verdict.successor is not None:
                self._attempt = Attempt.from_message(verdict.successor)
                verdict = self._take_part()
            if self.lifeline.has_lost_head:
                verdict = self.record(verdict)
        finally:
            self.lifeline.close()
            if self.joined.listener is not None:
                self.joined.listener.close()
        self._finish(verdict)
        return verdict.code

    def _take_part(self) -> Verdict:
        if self.seat.node_rank not in self._attempt.places:
            return self.lifeline.stand_by()
        plan, path = self._attempt.plan_of(self.plan, self.plan_path)
        is_first = self.seat.node_rank == 0
        agent = NodeAgent(
            _at_this_node(plan, self.joined, self.inherited),
            plan_path=path,
            console=self.console if is_first else _OtherNodesConsole(self.console),
            inherited=self.inherited,
            host=self.seat.host,
            node_rank=self._attempt.places.index(self.seat.node_rank),
            joined=self.joined,
            lifeline=self.lifeline,
            conclude=self._conclude,
            read_limit=self.read_limit,
        )
        agent.run()
        self._saved = agent.saved or self._saved
        assert agent.verdict is not None
        return agent.verdict

    def _conclude(self, verdict: Verdict, alive: Collection[int]) -> Verdict:
        """On the first node: whether a spare one takes the place of what was lost."""
        places = attempts.with_spares(self._attempt.places, alive) if verdict.lost else None
        if places is None:
            return self.record(verdict)
        new = [self.seat.name_of(node) for node in places if node not in self._attempt.places]
        self.console.say(str(verdict.cause))
        self.console.say(f"going on without {', '.join(verdict.lost)}, with {', '.join(new)}")
        following = attempts.claim(self.plan, self.plan_path, again=True, places=places)
        return dataclasses.replace(verdict, successor=dataclasses.asdict(following))

    def _finish(self, verdict: Verdict) -> None:
        if self.seat.node_rank == 0 or self.lifeline.has_lost_head:
            plan, _ = self._attempt.plan_of(self.plan, self.plan_path)
            _tell(verdict, self.console)
            self.console.end(ending.summary(plan, exit_code=verdict.code, saved=self._saved))
            self.console.close()


def describe_meeting(joined: Joined, *, needed: int) -> str:
    """Where and how fast the nodes have met, in a line, as the first one sees it."""
    number = len(joined.connections) + 1
    spare = f", {number - needed} of them spare" if number > needed else ""
    interface = interface_of(joined.own_address)
    through = f" ({interface})" if interface else ""
    return (
        f"{number} nodes met at {joined.address}:{joined.port}{through} "
        f"in {joined.seconds:.1f} s{spare}"
    )


def _tell(verdict: Verdict, console: Console) -> None:
    if verdict.cause is not None:
        console.fail(verdict.cause)
    elif verdict.code:
        console.say(f"the run stopped early, with exit code {verdict.code}")


def _meet(plan: RunPlan, plan_path: Path, *, seat: Seat, console: Console, again: bool) -> Joined:
    mark = hashlib.blake2b(seat.token + seat.job.encode(), digest_size=6).hexdigest()
    storage = StorageToken(plan.output_dir, mark=mark)
    is_first = seat.node_rank == 0

    def facts() -> dict[str, Any]:
        return agreement.node_facts(
            plan,
            gpus=visible_gpus(os.environ),
            cores=threads.available_cores(),
            sees_output=storage.is_there(),
        )

    def decide(members: Sequence[Member]) -> Mapping[str, Any]:
        for note in agreement.compare(members, plan):
            console.say(note)
        here = sorted(member.node_rank for member in members)
        places = here[: plan.topology.nodes]
        return dataclasses.asdict(attempts.claim(plan, plan_path, again=again, places=places))

    if is_first:
        storage.write()
    try:
        joined = rendezvous.join(seat, facts, decide=decide, say=console.say)
    finally:
        if is_first:
            storage.remove()
    if is_first:
        console.say(describe_meeting(joined, needed=plan.topology.nodes))
    return joined


def _at_this_node(plan: RunPlan, joined: Joined, inherited: Mapping[str, str]) -> RunPlan:
    """With what is this node's own: its interface to the others, its cores."""
    said = {**inherited, **plan.environment}
    environment = {**plan.environment, **interface_variables(joined, said=said)}
    return dataclasses.replace(
        plan,
        environment=environment,
        threads_per_rank=threads.per_rank(plan.topology.procs_per_node),
    )


def interface_variables(joined: Joined, *, said: Mapping[str, str]) -> dict[str, str]:
    """What makes gloo and NCCL take the way on which the nodes met, unless it was said already."""
    return ways_through(interface_of(joined.own_address), said=said)


def ways_through(interface: str | None, *, said: Mapping[str, str]) -> dict[str, str]:
    """As `interface_variables`, for an interface that is known, or not."""
    if interface is None:
        return {}
    # NCCL would take all interfaces that begin with the name.
    ways = {"GLOO_SOCKET_IFNAME": interface, "NCCL_SOCKET_IFNAME": f"={interface}"}
    return {name: value for name, value in ways.items() if name not in said}


def visible_gpus(environment: Mapping[str, str]) -> list[str]:
    """Names of the NVIDIA GPUs that this task may use, as the driver tells them."""
    names = []
    for record in sorted(_GPU_RECORDS.glob("*/information")):
        lines = record.read_text(errors="replace").splitlines()
        models = [line.partition(":")[2].strip() for line in lines if line.startswith("Model")]
        names += models or ["GPU"]
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    return names if visible is None else names[: len([v for v in visible.split(",") if v])]


class _StoppedError(Exception):
    """A signal to stop came while the nodes were meeting."""

    def __init__(self, number: int) -> None:
        is_notice = number in (signal.SIGUSR1, signal.SIGUSR2)
        self.exit_code = EXIT_AGAIN if is_notice else 128 + number
        super().__init__(signal.Signals(number).name)


class _StopSignals:
    """Signals outside the time in which the agent passes them on: before, they end the meeting;
    after, when this node only waits for the others, they shorten the wait."""

    def __init__(self) -> None:
        self._then: Callable[[], None] | None = None
        self._before: dict[int, Any] = {}

    def then(self, action: Callable[[], None]) -> None:
        """From now on, call `action` instead of ending the meeting."""
        self._then = action

    def __enter__(self) -> _StopSignals:
        for number in _STOPPING:
            self._before[number] = signal.signal(number, self._notice)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _notice(self, number: int, frame: FrameType | None) -> None:
        if self._then is None:
            raise _StoppedError(number)
        self._then()


class _OtherNodesConsole:
    """Of a node that is not the first only what needs attention is shown."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def say(self, text: str) -> None:
        """Nothing: the first node says the same."""

    def fail(self, text: str, *, details: Mapping[str, Any] | None = None) -> None:
        """Nothing: the first node tells, once, what the run ended with."""

    def show(self, event: Event) -> None:
        if event.kind in ("warning", "error"):
            self._console.show(event)

    def output(self, data: bytes) -> None:
        self._console.output(data)

    def end(self, summary: Mapping[str, Any]) -> None:
        """Nothing: it is the first node's to say."""

    def close(self) -> None:
        self._console.close()
