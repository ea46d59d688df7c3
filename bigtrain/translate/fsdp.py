"""What FSDP2's `fully_shard` is called with."""

from __future__ import annotations

from bigtrain.topology import Topology
from bigtrain.translate.config import EngineOptions, FsdpSettings


def settings(options: EngineOptions, topology: Topology) -> FsdpSettings:
    """Fully sharded over `topology.shard_size` ranks; parameters are freed after the forward."""
    reshard = options.reshard_after_forward
    return FsdpSettings(
        shard_size=topology.shard_size,
        reshard_after_forward=True if reshard is None else reshard,
        cpu_offload=bool(options.cpu_offload),
        wrap_classes=options.wrap_classes or (),
        forward_prefetch=options.forward_prefetch or 0,
        reduce_each_micro_batch=bool(options.reduce_each_micro_batch),
    )
