"""One process: nothing to set, but there must be only one."""

from __future__ import annotations

from collections.abc import Iterator

from bigtrain.topology import Topology
from bigtrain.translate.config import SingleSettings


def settings() -> SingleSettings:
    """The settings of the engine `single`: none."""
    return SingleSettings()


def faults(topology: Topology) -> Iterator[str]:
    """What keeps the engine from running on `topology`."""
    if topology.world_size > 1:
        yield (
            f"engine single runs one process, not {topology.world_size}; "
            "use ddp, fsdp or zero1 to zero3, or one process"
        )
