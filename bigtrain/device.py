"""The device that this rank trains on."""

from __future__ import annotations

import torch

from bigtrain.errors import LaunchError
from bigtrain.topology import RankInfo


def choose_device(kind: str, *, world: RankInfo) -> torch.device:
    """This rank's device, made the current one. `kind` is the plan's: `cpu` or `cuda`.

    A launcher may show each rank all of its node's GPUs, or its own only.
    """
    if kind == "cpu":
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if count == 0:
        raise LaunchError(
            "the plan says cuda, but this rank sees no GPU; check the driver and "
            "CUDA_VISIBLE_DEVICES, or train on the CPU with training.use_cpu: true"
        )
    index = 0 if count == 1 else world.local_rank
    if index >= count:
        raise LaunchError(
            f"rank {world.rank} is number {world.local_rank} on its node, which has {count} GPUs; "
            f"use --procs-per-node {count}"
        )
    device = torch.device("cuda", index)
    torch.cuda.set_device(device)
    return device
