"""How much memory each rank of a Slurm job will have, as far as it is known at its submission."""

from __future__ import annotations

import re
from collections.abc import Mapping

from bigtrain.errors import LaunchError
from bigtrain.plan import RunPlan
from bigtrain.planning.device_memory import DeviceMemory
from bigtrain.slurm import client
from bigtrain.slurm.settings import SlurmSettings, read_settings

_MIB = 2**20
_UNITS = {"": _MIB, "K": 2**10, "M": _MIB, "G": 2**30, "T": 2**40}
_UNSET_MIB = 1
"""What Slurm tells of nodes for which slurm.conf gives no RealMemory."""


class JobMemory:
    """The memory of the ranks of a plan, on the nodes that Slurm will give; partitions are asked
    for once each.

    A GPU's is what was said (`--device-memory`): Slurm doesn't know it. A node's is what the job
    asks for, and no more than the partition's largest node has.
    """

    def __init__(self, said: int | None) -> None:
        self._said = said
        self._known: dict[str | None, int | None] = {}

    def __call__(self, plan: RunPlan) -> DeviceMemory:
        procs = plan.topology.procs_per_node
        node, place = self._node(read_settings(plan.slurm))
        share = None if node is None else node // procs
        if plan.device == "cuda" or self._said is not None:
            origin = "" if self._said is None else "flag --device-memory"
            host = share if plan.device == "cuda" else None
            return DeviceMemory(total=self._said, origin=origin, device=plan.device, host=host)
        origin = "" if share is None else f"{place} ÷ {procs} processes"
        return DeviceMemory(total=share, origin=origin, device="cpu")

    def _node(self, settings: SlurmSettings) -> tuple[int | None, str]:
        """Bytes of one node, and where they are known from."""
        partition = settings.options.get("partition")
        asked = _asked(settings)
        if partition not in self._known:
            self._known[partition] = _largest_node(partition)
        there = self._known[partition]
        if asked is not None and (there is None or asked < there):
            return asked, "what the job asks for"
        return there, "the partition's largest node"


def _asked(settings: SlurmSettings) -> int | None:
    """Bytes of a node that the options ask for; None where that is not said, or is all of it."""
    options: Mapping[str, str | None] = settings.options
    whole = _read_size(options.get("mem"))
    if whole is not None:
        return whole
    each, gpus = _read_size(options.get("mem-per-gpu")), settings.gpus_per_node
    return None if each is None or gpus is None else each * gpus


def _read_size(text: str | None) -> int | None:
    found = re.fullmatch(r"(\d+)([KMGT]?)B?", (text or "").strip().upper())
    return int(found[1]) * _UNITS[found[2]] or None if found else None


def _largest_node(partition: str | None) -> int | None:
    command = ["sinfo", "--noheader", "--exact", "--format=%P|%m"]
    try:
        text = client.call(command + ([f"--partition={partition}"] if partition else []))
    except LaunchError:
        return None
    found = [
        int(memory.rstrip("+"))
        for name, _, memory in (line.partition("|") for line in text.splitlines())
        if (partition or name.endswith("*")) and memory.rstrip("+").isdigit()
    ]
    largest = max(found, default=_UNSET_MIB)
    return largest * _MIB if largest > _UNSET_MIB else None
