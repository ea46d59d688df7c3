"""What the nodes of a partition have, so that a job can ask for its fair share of their CPUs."""

from __future__ import annotations

import re
from dataclasses import dataclass

from bigtrain.errors import LaunchError
from bigtrain.slurm import client

_GPUS = re.compile(r"(?:^|,)gpu(?::[^:,()]+)?:(\d+)")


@dataclass(frozen=True, kw_only=True)
class NodeShape:
    """The least that any node of the partition has."""

    cpus: int
    gpus: int

    def share(self, procs: int) -> int:
        """CPUs for `procs` ranks, one GPU each: all of a node's for all of its GPUs."""
        if self.gpus == 0:
            return self.cpus
        return max(1, self.cpus * min(procs, self.gpus) // self.gpus)


def survey(partition: str | None) -> NodeShape | None:
    """The shape of the nodes of `partition`, or of the default one; None if Slurm won't say."""
    command = ["sinfo", "--noheader", "--exact", "--format=%R|%c|%G"]
    if partition is not None:
        command.append(f"--partition={partition}")
    else:
        command[-1] = "--format=%P|%c|%G"
    try:
        return read_shapes(client.call(command), default_only=partition is None)
    except LaunchError:
        return None


def read_shapes(text: str, *, default_only: bool) -> NodeShape | None:
    """The least of every line `partition|cpus|gres`; a default partition's name ends in `*`."""
    shapes = []
    for line in text.splitlines():
        name, _, rest = line.partition("|")
        cpus, _, gres = rest.partition("|")
        if (default_only and not name.endswith("*")) or not cpus.rstrip("+").isdigit():
            continue
        found = _GPUS.findall(gres)
        shapes.append((int(cpus.rstrip("+")), sum(int(count) for count in found)))
    if not shapes:
        return None
    return NodeShape(cpus=min(c for c, _ in shapes), gpus=min(g for _, g in shapes))
