"""What one rank can't do, all ranks hear of: nobody waits for one that has given up.

Object collectives of torch.distributed's default group, which carry CPU data. A rank alone needs
no group.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from bigtrain.errors import CheckpointError
from bigtrain.topology import RankInfo

T = TypeVar("T")


def attempt(world: RankInfo, action: Callable[[], T]) -> T:
    """`action`'s value, when it succeeded on all ranks; else an error on all of them.

    All ranks call. `action` itself must not wait for other ranks.
    """
    value, fault = _try(action)
    faults = _all_gather(world, None if fault is None else _text(fault))
    _raise_together(faults, own=fault)
    return value  # type: ignore[return-value]


def on_main(world: RankInfo, action: Callable[[], T]) -> T:
    """The value of `action` on rank 0, on all ranks; where it fails, an error on all of them."""
    value, fault = _try(action) if world.is_main else (None, None)
    shared: list[Any] = [(value, None if fault is None else _text(fault))]
    if world.world_size > 1:
        dist.broadcast_object_list(shared, src=0)
    value, message = shared[0]
    _raise_together([message], own=fault)
    return value  # type: ignore[no-any-return]


def gather(world: RankInfo, value: T) -> list[T]:
    """Every rank's value, by rank, on rank 0; an empty list elsewhere."""
    if world.world_size == 1:
        return [value]
    gathered: list[Any] | None = [None] * world.world_size if world.is_main else None
    dist.gather_object(value, gathered, dst=0)
    return gathered or []


def gather_all(world: RankInfo, value: T) -> list[T]:
    """Every rank's value, by rank, on all ranks."""
    return _all_gather(world, value)


def _try(action: Callable[[], T]) -> tuple[T | None, Exception | None]:
    try:
        return action(), None
    except Exception as fault:  # whatever it is, the others must hear of it
        return None, fault


def _text(fault: Exception) -> str:
    return str(fault) if isinstance(fault, CheckpointError) else f"{type(fault).__name__}: {fault}"


def _all_gather(world: RankInfo, value: T) -> list[T]:
    if world.world_size == 1:
        return [value]
    gathered: list[Any] = [None] * world.world_size
    dist.all_gather_object(gathered, value)
    return gathered


def _raise_together(faults: list[str | None], *, own: Exception | None) -> None:
    told = [(rank, fault) for rank, fault in enumerate(faults) if fault is not None]
    if not told:
        return
    distinct = {fault for _, fault in told}
    if len(distinct) == 1:
        message = distinct.pop()
    else:
        message = "\n".join(f"rank {rank}: {fault}" for rank, fault in told)
    raise CheckpointError(message) from own
