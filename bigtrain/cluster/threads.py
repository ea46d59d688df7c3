"""How many CPU cores there are for a run, and how its processes share them."""

from __future__ import annotations

import os
from pathlib import Path

_MOST_RANKS_PER_CORE = 4
"""Beyond this, ranks on the CPU spend their time waiting for each other's turn."""

_CPU_TREE = Path("/sys/devices/system/cpu")
_CGROUP_TREE = Path("/sys/fs/cgroup")


def available_cores() -> int:
    """Physical cores that this process may use: its affinity and its control group's quota."""
    cores = _physical_cores(_allowed_cpus(), _CPU_TREE)
    quota = _cgroup_quota(_CGROUP_TREE)
    return cores if quota is None else max(1, min(cores, int(quota)))


def per_rank(procs: int) -> int:
    """Threads for each of `procs` ranks on this node: an equal share of the cores, at least 1."""
    return max(1, available_cores() // procs)


def most_ranks() -> int:
    """The most ranks that this node's cores can carry without a device of their own."""
    return available_cores() * _MOST_RANKS_PER_CORE


def sensible(procs: int) -> bool:
    """Whether the cores can carry that many ranks on the CPU."""
    return procs <= most_ranks()


def _allowed_cpus() -> set[int]:
    if hasattr(os, "sched_getaffinity"):
        return set(os.sched_getaffinity(0))
    return set(range(os.cpu_count() or 1))


def _physical_cores(cpus: set[int], tree: Path) -> int:
    """Cores behind the logical `cpus`: hyper-threads of one core count once."""
    cores = set()
    for cpu in cpus:
        topology = tree / f"cpu{cpu}" / "topology"
        try:
            package = (topology / "physical_package_id").read_text().strip()
            core = (topology / "core_id").read_text().strip()
        except OSError:
            package, core = "", f"cpu{cpu}"  # unknown: a core of its own
        cores.add((package, core))
    return max(1, len(cores))


def _cgroup_quota(tree: Path) -> float | None:
    """CPUs that the control group grants (version 2, then 1); None without a limit.

    Inside a container the process's own group is mounted as the root of the tree, outside of it
    the limits of every group on the way up hold.
    """
    limits = [_v2_limit(folder / "cpu.max") for folder in _own_groups(tree)]
    limits.append(_v1_limit(tree / "cpu"))
    known = [limit for limit in limits if limit is not None]
    return min(known, default=None)


def _own_groups(tree: Path) -> list[Path]:
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return [tree]
    paths = [line[len("0::/") :] for line in lines if line.startswith("0::/")]
    folders = [tree]
    for path in paths:
        parts = Path(path).parts
        folders += [tree.joinpath(*parts[: i + 1]) for i in range(len(parts))]
    return folders


def _v2_limit(path: Path) -> float | None:
    try:
        quota, period = path.read_text().split()
        return None if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError):
        return None


def _v1_limit(folder: Path) -> float | None:
    try:
        quota = int((folder / "cpu.cfs_quota_us").read_text())
        period = int((folder / "cpu.cfs_period_us").read_text())
    except (OSError, ValueError):
        return None
    return quota / period if quota > 0 else None
