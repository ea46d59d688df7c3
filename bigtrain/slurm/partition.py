"""What the nodes of a partition have: a job asks for its fair share of their CPUs, and is planned
for no more than their memory."""

from __future__ import annotations

import re
from dataclasses import dataclass

from bigtrain.errors import LaunchError
from bigtrain.slurm import client

_GPUS = re.compile(r"(?:^|,)gpu(?::[^:,()]+)?:(\d+)")
_UNSET_MIB = 1
"""The memory that Slurm tells of nodes for which slurm.conf gives no RealMemory."""


@dataclass(frozen=True, kw_only=True)
class NodeShape:
    """What a kind of nodes has."""

    cpus: int
    gpus: int

    def share(self, gpus: int) -> int:
        """The CPUs that belong to as many of its GPUs."""
        share = self.cpus * min(gpus, self.gpus) // self.gpus if self.gpus else self.cpus
        return max(1, share)


@dataclass(frozen=True, kw_only=True)
class Partition:
    """The kinds of nodes that a job may be given: at least one."""

    shapes: tuple[NodeShape, ...]
    numbers: tuple[int, ...]
    """How many nodes of each kind there are, whatever they are doing."""
    largest_memory_mib: int | None = None
    """Of the node that has the most; None where Slurm knows of none."""

    @property
    def has_gpus(self) -> bool:
        """Whether any of its nodes has; a job that asks for GPUs is given these."""
        return any(shape.gpus for shape in self.shapes)

    def cpus(self, gpus: int) -> int:
        """The CPUs that belong to `gpus` GPUs of a node, on any node that has as many: all of a
        node's for all of its GPUs. For no GPUs, those that any node has."""
        if gpus == 0:
            return min(shape.cpus for shape in self.shapes)
        fitting = [shape for shape in self.shapes if shape.gpus >= gpus]
        fitting = fitting or [shape for shape in self.shapes if shape.gpus] or list(self.shapes)
        return min(shape.share(gpus) for shape in fitting)

    def nodes(self, gpus: int) -> int:
        """How many of its nodes have as many GPUs."""
        kinds = zip(self.shapes, self.numbers, strict=True)
        return sum(number for shape, number in kinds if shape.gpus >= gpus)


class Survey:
    """What Slurm says of its partitions; each is asked for once."""

    def __init__(self) -> None:
        self._known: dict[str | None, Partition | None] = {}

    def partition(self, name: str | None) -> Partition | None:
        """The partition `name`, or the default one; None if Slurm won't say."""
        if name not in self._known:
            self._known[name] = _ask(name)
        return self._known[name]


def partition_names() -> str:
    """Those that there are, for a message; empty if Slurm won't say."""
    try:
        text = client.call(["sinfo", "--noheader", "--format=%R"])
    except LaunchError:
        return ""
    return ", ".join(dict.fromkeys(text.split()))


def _ask(partition: str | None) -> Partition | None:
    command = ["sinfo", "--noheader", "--exact", "--format=%P|%D|%c|%m|%G"]
    if partition is not None:
        command.append(f"--partition={partition}")
    try:
        return read_shapes(client.call(command), default_only=partition is None)
    except LaunchError:
        return None


def read_shapes(text: str, *, default_only: bool) -> Partition | None:
    """Of every line `partition|nodes|cpus|MiB|gres`; a default partition's name ends in `*`."""
    found: dict[NodeShape, int] = {}
    largest = _UNSET_MIB
    for line in text.splitlines():
        name, number, cpus, memory, gres = [*line.split("|", 4), *[""] * 4][:5]
        cpus, memory = cpus.rstrip("+"), memory.rstrip("+")
        is_row = cpus.isdecimal() and number.isdecimal()
        if not is_row or (default_only and not name.endswith("*")):
            continue
        gpus = sum(int(count) for count in _GPUS.findall(gres))
        shape = NodeShape(cpus=int(cpus), gpus=gpus)
        found[shape] = found.get(shape, 0) + int(number)
        if memory.isdecimal():
            largest = max(largest, int(memory))
    if not found:
        return None
    return Partition(
        shapes=tuple(found),
        numbers=tuple(found.values()),
        largest_memory_mib=largest if largest > _UNSET_MIB else None,
    )
