"""What nodes must have in common before they train together, and where they differ.

Each node states its facts (`node_facts`); the first one compares them (`compare`). What would
spoil the run is refused on all nodes, what only looks odd is said, both as a table node by node.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import platform
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from bigtrain.cluster.rendezvous import Member
from bigtrain.errors import LaunchError
from bigtrain.plan import RunPlan

_PACKAGES = ("bigtrain", "torch", "transformers", "accelerate", "deepspeed", "datasets", "numpy")
# Differ between nodes by right, or are decided when the nodes have met.
_FREE_FIELDS = frozenset(
    {"attempt", "run_id", "begun_anew", "resume", "origins", "threads_per_rank"}
)
_CLOCKS_WITHIN_S = 5.0
_MOST_NODES = 16
"""Beyond these, a table only counts."""


def node_facts(
    plan: RunPlan, *, gpus: Sequence[str], cores: int, sees_output: bool
) -> dict[str, Any]:
    """What this node says of itself. `gpus`: the names of those that the task may use."""
    return {
        **software_facts(plan),
        "gpus": list(gpus),
        "cores": cores,
        "sees_output": sees_output,
    }


def software_facts(plan: RunPlan) -> dict[str, Any]:
    """The part of it that is the same for all processes of a node."""
    return {
        "versions": {"python": platform.python_version(), **_versions()},
        "plan": _field_hashes(plan),
    }


def compare_software(members: Sequence[Member]) -> None:
    """LaunchError where the versions or the plans differ."""
    faults = _software_differences(members)
    if faults:
        raise LaunchError("\n".join(["the ranks can't train together:", *faults]))


def compare(members: Sequence[Member], plan: RunPlan) -> list[str]:
    """Differences that don't forbid the run, in words. LaunchError with all those that do."""
    faults = [
        *_software_differences(members),
        *_missing_gpus(members, plan),
        *_unshared_storage(members, plan),
    ]
    if faults:
        raise LaunchError("\n".join(["the nodes can't train together:", *faults]))
    return [*_odd_clocks(members), *_odd_devices(members)]


def saves(plan: RunPlan) -> bool:
    """Whether checkpoints are written, which the ranks of another node must find at a resume."""
    return bool(plan.training.get("save_strategy", "steps") != "no")


def _versions() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def _field_hashes(plan: RunPlan) -> dict[str, str]:
    """Field → a short hash of its value: tells what differs without sending it all."""
    fields = dataclasses.asdict(plan)
    return {
        name: hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]
        for name, value in fields.items()
        if name not in _FREE_FIELDS
    }


def _software_differences(members: Sequence[Member]) -> list[str]:
    return [
        *_differences("versions", members, "install the same everywhere"),
        *_differences("plan", members, "start all nodes with the same run file and flags"),
    ]


def _differences(fact: str, members: Sequence[Member], advice: str) -> list[str]:
    """A table of every part of `fact` that is not the same on all nodes."""
    values = [(member, member.facts.get(fact, {})) for member in members]
    names = sorted({name for _, parts in values for name in parts})
    odd = [name for name in names if len({parts.get(name) for _, parts in values}) > 1]
    if not odd:
        return []
    rows = [["node", *odd]]
    rows += [[m.host, *(str(parts.get(name, "-")) for name in odd)] for m, parts in values]
    return [f"{fact} differ; {advice}", *_table(rows)]


def _missing_gpus(members: Sequence[Member], plan: RunPlan) -> list[str]:
    procs = plan.topology.procs_per_node
    if plan.device != "cuda":
        return []
    short = [m for m in members if len(m.facts.get("gpus", ())) < procs]
    if not short:
        return []
    rows = [["node", "GPUs"], *([m.host, str(len(m.facts.get("gpus", ())))] for m in short)]
    return [f"{procs} processes on each node need {procs} GPUs there", *_table(rows)]


def _unshared_storage(members: Sequence[Member], plan: RunPlan) -> list[str]:
    blind = [m.host for m in members if not m.facts.get("sees_output", True)]
    if not blind or not saves(plan) or plan.training.get("save_on_each_node"):
        return []
    return [
        f"output_dir {plan.output_dir} is not the same storage everywhere: "
        f"{', '.join(blind[:_MOST_NODES])} can't see what {members[0].host} wrote there, so a "
        "resume would not find the checkpoint; give an output_dir that all nodes share, let each "
        "node keep its own part (training.save_on_each_node: true), or save none "
        "(training.save_strategy: no)"
    ]


def _odd_clocks(members: Sequence[Member]) -> list[str]:
    odd = [m for m in members if abs(m.clock_offset_s) > _CLOCKS_WITHIN_S]
    if not odd:
        return []
    rows = [["node", "ahead by"], *([m.host, f"{m.clock_offset_s:.1f} s"] for m in odd)]
    return [f"clocks differ from {members[0].host}'s; times in logs do too", *_table(rows)]


def _odd_devices(members: Sequence[Member]) -> list[str]:
    kinds = {m.host: _counted(m.facts.get("gpus", ())) for m in members}
    if len(set(kinds.values())) < 2:
        return []
    rows = [["node", "devices"], *([host, kind] for host, kind in kinds.items())]
    return ["devices differ; the slowest sets the pace", *_table(rows)]


def _counted(names: Sequence[str]) -> str:
    return ", ".join(f"{names.count(name)}x {name}" for name in sorted(set(names))) or "CPU only"


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    shown = rows[: _MOST_NODES + 1]
    widths = [max(len(row[column]) for row in shown) for column in range(len(rows[0]))]
    padded = [[cell.ljust(w) for cell, w in zip(row, widths, strict=True)] for row in shown]
    lines = [f"  {'  '.join(cells)}".rstrip() for cells in padded]
    more = len(rows) - len(shown)
    return [*lines, f"  … and {more} more"] if more else lines


class StorageToken:
    """A file that the first node writes into the run's directory and the others look for.

    Only the same storage shows it to them: the same path on two disks does not.
    """

    def __init__(self, output_dir: str, *, mark: str) -> None:
        self.path = Path(output_dir) / f".bigtrain-meeting-{mark}"

    def write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text("the nodes of a run look for this file while they meet\n")

    def is_there(self) -> bool:
        """By its name, which was never looked for before and so can't be remembered as missing, and
        in a listing: network file systems remember one or the other."""
        try:
            return self.path.exists() or self.path in self.path.parent.iterdir()
        except OSError:
            return False

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)
