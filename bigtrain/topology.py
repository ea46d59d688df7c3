"""How many processes a run has, and which of them this one is."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from bigtrain.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Topology:
    """Shape of a run: `nodes` × `procs_per_node` processes, data-parallel over all of them.

    `shard_size` ranks share one copy of the model; `replicate_size` such groups hold copies.
    """

    nodes: int = 1
    procs_per_node: int = 1
    shard_size: int = 1

    def __post_init__(self) -> None:
        for name in ("nodes", "procs_per_node", "shard_size"):
            value = getattr(self, name)
            if value < 1:
                raise ConfigError(f"{name} is {value}; it must be at least 1")
        if self.world_size % self.shard_size:
            fitting = [str(n) for n in range(1, self.world_size + 1) if self.world_size % n == 0]
            raise ConfigError(
                f"world size {self.world_size} is not divisible by shard size {self.shard_size}; "
                f"use {', '.join(fitting)}"
            )

    @property
    def world_size(self) -> int:
        return self.nodes * self.procs_per_node

    @property
    def replicate_size(self) -> int:
        return self.world_size // self.shard_size


# The variables of each launcher, in the order in which they are believed. Slurm's come after
# torchrun's because torchrun is often started by srun, and then only its own name the rank.
_LAUNCHERS: tuple[tuple[str, dict[str, str]], ...] = (
    (
        "torchrun",
        {
            "rank": "RANK",
            "world_size": "WORLD_SIZE",
            "local_rank": "LOCAL_RANK",
            "local_world_size": "LOCAL_WORLD_SIZE",
            "node_rank": "GROUP_RANK",
        },
    ),
    (
        "slurm",
        {
            "rank": "SLURM_PROCID",
            "world_size": "SLURM_STEP_NUM_TASKS",
            "local_rank": "SLURM_LOCALID",
            "node_rank": "SLURM_NODEID",
        },
    ),
    (
        "mpi",
        {
            "rank": "OMPI_COMM_WORLD_RANK",
            "world_size": "OMPI_COMM_WORLD_SIZE",
            "local_rank": "OMPI_COMM_WORLD_LOCAL_RANK",
            "local_world_size": "OMPI_COMM_WORLD_LOCAL_SIZE",
            "node_rank": "OMPI_COMM_WORLD_NODE_RANK",
        },
    ),
)


@dataclass(frozen=True, kw_only=True)
class RankInfo:
    """Which process of the run this is. Read once, from whichever launcher started it."""

    rank: int = 0
    local_rank: int = 0
    node_rank: int = 0
    world_size: int = 1
    local_world_size: int = 1
    source: str = "alone"

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world_size:
            raise ConfigError(
                f"rank {self.rank} is outside the world of {self.world_size} ranks "
                f"(as {self.source} set it)"
            )

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def is_local_main(self) -> bool:
        return self.local_rank == 0

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> RankInfo:
        """The place in the run that `environment` describes; alone when it describes none."""
        for source, names in _LAUNCHERS:
            if source == "slurm" and not _is_slurm_task(environment):
                continue
            if names["rank"] in environment and names["world_size"] in environment:
                return cls(**_read_ranks(source, names, environment), source=source)
        return cls()


def _is_slurm_task(environment: Mapping[str, str]) -> bool:
    """Whether srun started this process as a task of a step.

    The shell of a batch script or of an allocation has a rank and a task count too, but it is no
    task: its step is one of the numbers that Slurm keeps for itself (slurm.h:
    SLURM_MAX_NORMAL_STEP_ID).
    """
    return is_slurm_step(environment.get("SLURM_STEP_ID", ""))


def is_slurm_step(number: str) -> bool:
    """Whether a step's number is that of one which srun started."""
    return number.isdigit() and int(number) < 0xFFFFFFF0


def _read_ranks(
    source: str, names: Mapping[str, str], environment: Mapping[str, str]
) -> dict[str, int]:
    values: dict[str, int] = {}
    for field, variable in names.items():
        if variable not in environment:
            continue
        text = environment[variable]
        if not text.isdigit():
            raise ConfigError(f"{variable}={text!r} ({source}) is not a whole number")
        values[field] = int(text)
    if source == "slurm" and "SLURM_STEP_TASKS_PER_NODE" in environment:
        counts = _tasks_per_node(environment["SLURM_STEP_TASKS_PER_NODE"])
        values["local_world_size"] = counts[min(values.get("node_rank", 0), len(counts) - 1)]
    values.setdefault("local_rank", values["rank"])
    values.setdefault("local_world_size", values["world_size"])
    values.setdefault("node_rank", values["rank"] // max(1, values["local_world_size"]))
    return values


def _tasks_per_node(text: str) -> list[int]:
    """Slurm's short form of how many tasks each node has: `2(x3),1` is 2, 2, 2, 1."""
    counts: list[int] = []
    for part in text.split(","):
        found = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if found is None:
            raise ConfigError(f"SLURM_STEP_TASKS_PER_NODE={text!r} is not of the form 2(x3),1")
        counts += [int(found[1])] * int(found[2] or 1)
    return counts
