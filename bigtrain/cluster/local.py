"""A run on this machine alone."""

from __future__ import annotations

import os
import platform
import shlex
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from bigtrain.cluster import ending, environment
from bigtrain.cluster.agent import Agent
from bigtrain.cluster.environment import Place
from bigtrain.cluster.layout import NodeLogs
from bigtrain.cluster.time_limit import TimeLimit
from bigtrain.console import Console
from bigtrain.errors import LaunchError, UnsupportedError
from bigtrain.plan import RunPlan


def launch(
    plan: RunPlan,
    plan_path: Path,
    *,
    console: Console,
    read_limit: Callable[[], TimeLimit | None] | None = None,
) -> int:
    """Run all ranks of `plan` here; returns the exit code when none of them is left.

    `read_limit` tells when the run has to be gone: it saves and leaves ahead of that. When this
    returns, the console has been told of failures of ranks. Call it in the main thread of a process
    that has no other children. Raises LaunchError when the ranks can't be started.
    """
    _check_platform(plan)
    _check_places(plan)
    console.say(_start_line(plan, os.environ))
    agent = Agent(
        plan,
        plan_path=plan_path.resolve(),
        console=console,
        inherited=os.environ,
        host=platform.node(),
        read_limit=read_limit,
    )
    try:
        exit_code = agent.run()
        console.end(ending.summary(plan, exit_code=exit_code, saved=agent.saved))
        return exit_code
    finally:
        console.close()


def describe(plan: RunPlan, *, node_rank: int = 0) -> list[str]:
    """What would start on a node: one line for the node, one for every rank."""
    logs = NodeLogs.of(
        output_dir=plan.output_dir, attempt=plan.attempt, node_rank=node_rank, host=platform.node()
    )
    lines = [_start_line(plan, os.environ), f"logs: {logs.directory}"]
    if plan.start_method == "fork" and plan.preload:
        lines.append(f"imported once: {', '.join(plan.preload)}")
    place = Place(node_rank=node_rank, store_host="127.0.0.1", store_port=0)
    for local_rank in range(plan.topology.procs_per_node):
        variables = environment.for_rank(
            plan, plan_path="", local_rank=local_rank, place=place, logs=logs, restarts=0
        )
        shown = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
        prefix = " ".join(f"{name}={variables[name]}" for name in shown)
        lines.append(f"{prefix} {shlex.join(_equivalent_command(plan))}")
    return lines


def _start_line(plan: RunPlan, inherited: Mapping[str, str]) -> str:
    procs = plan.topology.procs_per_node
    threads = environment.for_node(plan, inherited=inherited)["OMP_NUM_THREADS"]
    how = f"start: {plan.start_method}" + (f" ({plan.start_reason})" if plan.start_reason else "")
    return (
        f"{plan.name}: {procs} rank{'s' * (procs > 1)} on {platform.node()}, {plan.device}, "
        f"{threads} thread{'s' * (threads != '1')} each, {how}"
    )


def _equivalent_command(plan: RunPlan) -> list[str]:
    if plan.kind == "script":
        return [sys.executable, plan.source, *plan.script_args]
    return [sys.executable, "-m", "bigtrain.worker"]


def _check_platform(plan: RunPlan) -> None:
    if not sys.platform.startswith("linux"):
        raise UnsupportedError(
            f"bigtrain launch needs Linux, and this is {sys.platform}; "
            f"run one process without it: python -m bigtrain.worker {plan.source}"
        )
    if plan.topology.nodes > 1:
        raise UnsupportedError(
            f"the plan is for {plan.topology.nodes} nodes, and this machine is one; "
            "use --nodes 1, or start it on a cluster"
        )


def _check_places(plan: RunPlan) -> None:
    if plan.kind == "script" and not Path(plan.source).is_file():
        raise LaunchError(f"there is no script {plan.source}")
    if not Path(plan.working_dir).is_dir():
        raise LaunchError(f"the working directory {plan.working_dir} does not exist")
