"""The fields of a plan that say where a run is kept, how it starts, and from which checkpoint."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from bigtrain.arguments.values import did_you_mean
from bigtrain.cluster import threads
from bigtrain.errors import ConfigError
from bigtrain.paths import below
from bigtrain.planning.output_dir import begun_anew, next_attempt, run_id
from bigtrain.planning.processes import Processes
from bigtrain.planning.request import Surroundings
from bigtrain.sections import ClusterSection


def place(
    target: Path, output_dir: str, surroundings: Surroundings, *, resume: str
) -> dict[str, Any]:
    """The fields of a plan that are paths, absolute, and which attempt of which run it is."""
    directory = below(surroundings.working_dir, output_dir, label="output_dir").resolve()
    return {
        "source": str(target.resolve()),
        "working_dir": str(surroundings.working_dir),
        "output_dir": str(directory),
        "attempt": next_attempt(directory),
        "run_id": run_id(directory, begins_anew=resume == "never"),
        "begun_anew": begun_anew(directory, resume=resume),
        "resume": resume,
    }


def launching(
    processes: Processes, cluster: ClusterSection, *, fresh_reason: str
) -> dict[str, Any]:
    """The fields of a plan that say how its processes are started."""
    method, reason = _start(cluster, fresh_reason)
    return {
        "topology": processes.topology,
        "device": processes.device,
        "environment": cluster.environment(),
        "start_method": method,
        "start_reason": reason,
        "threads_per_rank": threads.per_rank(processes.topology.procs_per_node),
        "max_restarts": cluster.max_restarts,
        "slurm": cluster.slurm,
        "interface": cluster.interface,
        "join_timeout_s": cluster.join_timeout_s,
        "stop_grace_s": cluster.stop_grace_s,
    }


def _start(cluster: ClusterSection, fresh_reason: str) -> tuple[Literal["fork", "fresh"], str]:
    """The start method, and why where it was not asked for."""
    if sys.platform != "linux":
        return "fresh", f"{sys.platform} can't fork ranks safely"
    if cluster.start is None and fresh_reason:
        return "fresh", fresh_reason
    return cluster.start or "fork", ""


def resume(asked: str | None, training: Mapping[str, Any], working_dir: Path) -> str:
    """As `RunPlan.resume` has it. CheckpointError where a path holds no checkpoint."""
    said = training.get("resume_from_checkpoint") if asked is None else asked
    if said is None or said is True:
        return "auto"
    if said is False:
        return "never"
    if said in ("auto", "never", "script"):
        return str(said)
    from bigtrain.checkpoint.foreign import require_training_state

    path = below(working_dir, str(said), label="resume").resolve()
    if not path.exists() and (hint := did_you_mean(str(said), ("auto", "never"))):
        raise ConfigError(f"resume: there is no {said!r} here{hint}")
    require_training_state(path)
    return str(path)
