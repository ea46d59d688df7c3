"""Joining and leaving the process group that all ranks share.

torch is imported when a rank joins; the pure parts are for processes that never do.
"""

from __future__ import annotations

import atexit
import contextlib
import time
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from bigtrain.errors import LaunchError
from bigtrain.topology import RankInfo

if TYPE_CHECKING:
    import torch

DEFAULT_TIMEOUT_S = 1800
"""torch's own default for gloo, and TrainingArguments' for `ddp_timeout`."""


def join(world: RankInfo, *, device: torch.device, timeout_s: float = DEFAULT_TIMEOUT_S) -> bool:
    """Make this rank a member of the default process group; False if it already was one.

    Ranks meet at the store that MASTER_ADDR and MASTER_PORT name, as launchers set them; a rank
    that is alone needs none. On GPUs the group has two backends, so that what lies in host memory
    (checkpoints' tables, agreements) needs no detour over the device. The interpreter leaves the
    group at its exit if nobody did before: a member that just vanishes can die by SIGABRT. A group
    is joined once in a process: DeepSpeed keeps subgroups that outlive no second one.
    """
    import torch
    import torch.distributed as dist
    from torch._C._distributed_c10d import HashStore

    if dist.is_initialized():
        return False
    if device.type == "cuda":
        torch.cuda.set_device(device)
    try:
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
            rank=world.rank,
            world_size=world.world_size,
            timeout=timedelta(seconds=timeout_s),
            store=HashStore() if world.world_size == 1 else None,
        )
    except (ValueError, dist.DistError) as error:
        raise LaunchError(
            f"rank {world.rank} of {world.world_size} ({world.source}) could not join the others: "
            f"{error}; start all ranks with bigtrain launch, torchrun or srun"
        ) from error
    atexit.register(leave)
    return True


def leave() -> None:
    """Leave the default process group, if this rank is in one."""
    import torch.distributed as dist

    atexit.unregister(leave)
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
        _let_gloo_finish()


def _let_gloo_finish(*, patience_s: float = 2.0) -> None:
    """Wait until gloo's threads have dropped the tensors of their last collectives.

    The threads live for as long as a mesh or a model refers to a group. They let go of a tensor
    some time after the collective is done, need the interpreter for that, and where it is at its
    end already the process dies: "terminate called without an active exception", SIGABRT. A thread
    that sleeps all through a pause in which it could have had the interpreter has nothing left.
    """
    deadline = time.monotonic() + patience_s
    before: list[str] | None = None
    while time.monotonic() < deadline:
        now = _gloo_threads()
        if now == before and all("\tS (sleeping)" in status for status in now):
            return
        before = now
        time.sleep(0.02)


def _gloo_threads() -> list[str]:
    """State and context switches of each thread that runs collectives; none but on Linux."""
    found = []
    for task in Path("/proc/self/task").glob("*/status"):
        with contextlib.suppress(OSError):  # the thread has just ended
            status = task.read_text()
            if status.startswith("Name:\tpt_gloo_runloop\n"):
                found.append(status)
    return found
