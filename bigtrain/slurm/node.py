"""What a submitted job runs once on every node: `python -m bigtrain.slurm.node PLAN…`."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Mapping
from pathlib import Path

from bigtrain.cluster import nodes
from bigtrain.cluster.lifeline import Verdict
from bigtrain.cluster.rendezvous import RefusedError
from bigtrain.console import Console, open_console
from bigtrain.errors import BigtrainError, LaunchError
from bigtrain.plan import RunPlan, read_plan
from bigtrain.slurm import identity, provenance, time_limit
from bigtrain.slurm.progress import Progress
from bigtrain.slurm.record import SubmissionRecord, record_path

VERDICT_VARIABLE = "BIGTRAIN_VERDICT"
"""A file for the run's exit code: srun itself leaves with the highest of all its tasks' codes."""

_PATIENCE_S = 10.0
"""For git on a disk that is slow: all other nodes wait."""


def main() -> None:
    """Run this node's share of the plan, of several the one of this array job's index."""
    try:
        code = _run(sys.argv[1:], os.environ)
    except RefusedError as error:
        code = error.exit_code  # the first node has said why
    except BigtrainError as error:
        sys.stderr.write(f"{error}\n")
        code = error.exit_code
    # When one task leaves with an error, srun ends the others, which are as good as gone anyway.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.exit(code)


def _run(paths: list[str], environment: Mapping[str, str]) -> int:
    path = Path(_choose(paths, environment))
    plan = _plan_of_job(path, environment)
    seat = identity.read_seat(
        environment, interface=plan.interface, deadline_s=float(plan.join_timeout_s)
    )
    restarts = identity.restart_count(environment)
    console = open_console()
    if seat.node_rank == 0:
        _greet(plan, restarts, console)

    progress = Progress(plan, environment=environment)

    def record(verdict: Verdict) -> Verdict:
        verdict = progress.judge(verdict)
        if environment.get(VERDICT_VARIABLE):
            _record(verdict, Path(environment[VERDICT_VARIABLE]), is_first=seat.node_rank == 0)
        return verdict

    return nodes.launch(
        plan,
        path,
        seat=seat,
        console=console,
        inherited=environment,
        again=restarts > 0,
        record=record,
        read_limit=None if "signal" in plan.slurm else lambda: time_limit.of_job(environment),
    )


def _record(verdict: Verdict, path: Path, *, is_first: bool) -> None:
    """The first node has the last word: another one that believes the first to be lost may be the
    one that is cut off."""
    with contextlib.suppress(OSError), path.open("w" if is_first else "x") as file:
        file.write(f"{verdict.code}\n")


def _choose(paths: list[str], environment: Mapping[str, str]) -> str:
    index = environment.get("SLURM_ARRAY_TASK_ID", "0") if len(paths) > 1 else "0"
    if not index.isdigit() or int(index) >= len(paths):
        raise LaunchError(f"job {index} of the array has no plan; there are {len(paths)}")
    return paths[int(index)]


def _plan_of_job(path: Path, environment: Mapping[str, str]) -> RunPlan:
    if not path.exists():
        raise LaunchError(
            f"{environment.get('SLURMD_NODENAME', 'this node')} has no {path}: a submitted run's "
            "output_dir must be on storage that its nodes share; where each node keeps its own "
            "part (training.save_on_each_node), start it with slurm/own_script.sbatch"
        )
    return read_plan(path)


def _greet(plan: RunPlan, restarts: int, console: Console) -> None:
    """What is not as it was when the job was submitted."""
    if restarts:
        console.say(f"{plan.name}: start {restarts + 1} of this job")
    record = SubmissionRecord.read(record_path(plan.output_dir, plan.attempt))
    try:
        lines = _changes_since(record) if record else []
    except LaunchError as error:
        lines = [f"unknown: {error}"]
    for line in lines:
        console.say(f"changed since the job was submitted: {line}")


def _changes_since(record: SubmissionRecord) -> list[str]:
    if record.snapshot is not None:
        return []
    if record.code is not None:
        return provenance.changes(record.code, patience_s=_PATIENCE_S)
    source = Path(record.source)
    if not source.is_file():
        return [f"{source} is gone"]
    edited = provenance.hash_file(source) != record.source_sha256
    return [f"{source} was edited"] if edited else []
