"""How much memory each rank of a Slurm job will have, as far as it is known at its submission."""

from __future__ import annotations

import re
from collections.abc import Mapping

from bigtrain.errors import ConfigError
from bigtrain.plan import RunPlan
from bigtrain.planning.device_memory import DeviceMemory
from bigtrain.slurm.partition import Survey
from bigtrain.slurm.settings import SlurmSettings, read_settings

_MIB = 2**20
_UNITS = {"": _MIB, "K": 2**10, "M": _MIB, "G": 2**30, "T": 2**40}


class JobMemory:
    """The memory of the ranks of a plan, on the nodes that Slurm will give.

    A GPU's is what was said (`--device-memory`): Slurm doesn't know it. A node's is what the job
    asks for, and no more than the partition's largest node has.
    """

    def __init__(self, said: int | None, *, survey: Survey) -> None:
        self._said = said
        self._survey = survey

    def __call__(self, plan: RunPlan) -> DeviceMemory:
        procs = plan.topology.procs_per_node
        try:
            settings = read_settings(plan.slurm)
        except ConfigError:
            settings = SlurmSettings()  # it is told where the section itself is read
        node, place = self._node(settings)
        share = None if node is None else node // procs
        if plan.device == "cuda" or self._said is not None:
            origin = "" if self._said is None else "flag --device-memory"
            host = share if plan.device == "cuda" else None
            return DeviceMemory(total=self._said, origin=origin, device=plan.device, host=host)
        origin = "" if share is None else f"{place} ÷ {procs} processes"
        return DeviceMemory(total=share, origin=origin, device="cpu")

    def _node(self, settings: SlurmSettings) -> tuple[int | None, str]:
        """Bytes of one node, and where they are known from."""
        partition = self._survey.partition(settings.options.get("partition"))
        largest = None if partition is None else partition.largest_memory_mib
        there = None if largest is None else largest * _MIB
        asked = _asked(settings)
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
