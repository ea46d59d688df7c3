"""A run on several machines: what each of them does, once it knows which one it is.

    meet (rendezvous) → agree (agreement) → this attempt's plan → run (node_agent) → one verdict

Whoever starts the nodes (Slurm, or a person on each machine) gives every one its `Seat`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import signal
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from bigtrain.cluster import agreement, ending, rendezvous, threads
from bigtrain.cluster.agreement import StorageToken
from bigtrain.cluster.lifeline import EXIT_AGAIN, Verdict
from bigtrain.cluster.node_agent import NodeAgent
from bigtrain.cluster.rendezvous import Joined, Member, Seat
from bigtrain.cluster.rendezvous_address import interface_of
from bigtrain.console import Console, Event
from bigtrain.errors import ConfigError, LaunchError
from bigtrain.plan import RunPlan, read_plan, write_plan

_STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
_DECIDED = ("attempt", "run_id", "resume")
"""Fields of the plan that the first node decides on for all."""
_GPU_RECORDS = Path("/proc/driver/nvidia/gpus")


def launch(
    plan: RunPlan,
    plan_path: Path,
    *,
    seat: Seat,
    console: Console,
    inherited: Mapping[str, str],
    again: bool = False,
    record: Callable[[Verdict], None] = lambda verdict: None,
) -> int:
    """Run this node's share of `plan`; returns the run's exit code, the same on all nodes.

    Every node calls it in its main thread, with the plan as it was made, and where that lies or is
    to lie. `again`: the same run was started before, so this is a new attempt that goes on from
    the last checkpoint. `record` is called on the first node with the run's end, before any node
    leaves; where the first node is lost, on those that are left. LaunchError, on all nodes, when
    they can't start together.
    """
    if plan.max_restarts:
        raise ConfigError(
            "max_restarts restarts the ranks of one machine; a run over several nodes is started "
            "again as a whole (cluster.slurm.max_requeues)"
        )
    with _StopSignals() as signals:
        try:
            joined = _meet(plan, plan_path, seat=seat, console=console, again=again)
        except _StoppedError as stop:
            return stop.exit_code
        attempt_plan, attempt_path = _attempt_of(plan, plan_path, joined)
        agent = NodeAgent(
            _at_this_node(attempt_plan, joined, inherited),
            plan_path=attempt_path,
            console=console if seat.node_rank == 0 else _OtherNodesConsole(console),
            inherited=inherited,
            seat=seat,
            joined=joined,
            record=record,
        )
        signals.then(agent.lifeline.hurry)
        code = agent.run()
    if agent.lifeline.has_lost_head and agent.verdict is not None:
        record(agent.verdict)
    if seat.node_rank == 0 or agent.lifeline.has_lost_head:
        _tell(agent.verdict, console)
        console.end(ending.summary(attempt_plan, exit_code=code, saved=agent.saved))
        console.close()
    return code


def describe_meeting(joined: Joined, seat: Seat) -> str:
    """Where and how fast the nodes have met, in a line."""
    interface = interface_of(joined.own_address)
    through = f" ({interface})" if interface else ""
    return (
        f"{seat.num_nodes} nodes met at {joined.address}:{joined.port}{through} "
        f"in {joined.seconds:.1f} s"
    )


def _tell(verdict: Verdict | None, console: Console) -> None:
    if verdict is not None and verdict.cause is not None:
        console.fail(verdict.cause)
    elif verdict is not None and verdict.code:
        console.say(f"the run stopped early, with exit code {verdict.code}")


def _meet(plan: RunPlan, plan_path: Path, *, seat: Seat, console: Console, again: bool) -> Joined:
    mark = hashlib.blake2b(seat.token + seat.job.encode(), digest_size=6).hexdigest()
    storage = StorageToken(plan.output_dir, mark=mark)
    is_first = seat.node_rank == 0

    def facts() -> dict[str, Any]:
        return agreement.node_facts(
            plan,
            gpus=_visible_gpus(os.environ),
            cores=threads.available_cores(),
            sees_output=storage.is_there(),
        )

    def decide(members: Sequence[Member]) -> Mapping[str, Any]:
        for note in agreement.compare(members, plan):
            console.say(note)
        claimed, path = _claim_attempt(plan, plan_path, again=again)
        fields = {name: getattr(claimed, name) for name in _DECIDED}
        return {"fields": fields, "plan": path.name}

    if is_first:
        storage.write()
    try:
        joined = rendezvous.join(seat, facts, decide=decide, say=console.say)
    finally:
        if is_first:
            storage.remove()
    if is_first:
        console.say(describe_meeting(joined, seat))
    return joined


def _claim_attempt(plan: RunPlan, plan_path: Path, *, again: bool) -> tuple[RunPlan, Path]:
    """The plan with its attempt's number, recorded: no other start of the run has this number.

    A node that was thought lost may still write for minutes; what it writes bears its own number.
    """
    if not again and plan_path.is_file() and read_plan(plan_path) == plan:
        return plan, plan_path
    first = plan.attempt + 1 if again else plan.attempt
    for attempt in range(first, first + 10_000):
        resume = "auto" if again else plan.resume
        claimed = dataclasses.replace(plan, attempt=attempt, resume=resume)
        path = _path_of(plan_path, attempt)
        if path.exists():
            continue
        try:
            write_plan(claimed, path)
            return claimed, path
        except LaunchError:
            continue
    raise LaunchError(f"{plan_path.parent} holds plans of ten thousand attempts; clear it up")


def _path_of(plan_path: Path, attempt: int) -> Path:
    return plan_path.with_name(f"attempt-{attempt:02d}.json")


def _attempt_of(plan: RunPlan, plan_path: Path, joined: Joined) -> tuple[RunPlan, Path]:
    """The plan that the first node decided on, and this node's file of it."""
    decision = joined.decision
    chosen = dataclasses.replace(plan, **{name: decision["fields"][name] for name in _DECIDED})
    path = plan_path.with_name(decision["plan"])
    if not path.exists():  # a disk that is not shared
        with contextlib.suppress(LaunchError):  # another node of the same disk was faster
            write_plan(chosen, path)
    return chosen, path.resolve()


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


def _visible_gpus(environment: Mapping[str, str]) -> list[str]:
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
