"""Optimizer state that can't be divided by parameter: blocks of 8 bits, factored moments.

Each rank keeps its own as it is, and gets it back where engine and number of ranks are the same;
elsewhere it is refused by name. In the checkpoint its kind says whose it is:

    row@fsdp:1/2               of rank 1 of 2, under engine fsdp
    row@fsdp:1/2:S0:64x1       the same, as the local part of a DTensor of that shape
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

from bigtrain.errors import CheckpointError
from bigtrain.topology import RankInfo

_MARK = "@"


@dataclass(frozen=True, kw_only=True)
class Seat:
    """Whose state it is."""

    engine: str
    rank: int
    world_size: int

    def __str__(self) -> str:
        return f"{self.engine}:{self.rank}/{self.world_size}"


def seat_of(engine: str, world: RankInfo) -> Seat:
    """This rank's."""
    return Seat(engine=engine, rank=world.rank, world_size=world.world_size)


@dataclass(frozen=True, kw_only=True)
class Kept:
    """One such value, as it is stored."""

    kind: str
    local: Tensor


def keep(kind: str, value: Tensor, seat: Seat) -> Kept:
    """The value as this rank stores it."""
    if not isinstance(value, DTensor):
        return Kept(kind=f"{kind}{_MARK}{seat}", local=value.detach())
    layout = ",".join(map(_text, value.placements))
    shape = "x".join(map(str, value.shape))
    return Kept(kind=f"{kind}{_MARK}{seat}:{layout}:{shape}", local=value.to_local().detach())


def is_opaque(kind: str) -> bool:
    """Whether a stored kind is of some rank's own."""
    return _MARK in kind


def own_kinds(name: str, kinds: Iterable[str], seat: Seat) -> dict[str, str]:
    """What there is of this rank's: kind → as it is stored.

    CheckpointError where another engine or number of ranks kept it.
    """
    found: dict[str, str] = {}
    for stored in filter(is_opaque, kinds):
        kind, _, place = stored.partition(_MARK)
        engine, ranks, *_ = place.split(":")
        rank, _, world_size = ranks.partition("/")
        if (engine, int(world_size)) != (seat.engine, seat.world_size):
            raise CheckpointError(
                f"the optimizer's {kind!r} of {name!r} can't be divided over ranks: it was kept as "
                f"{world_size} ranks of engine {engine} had it, and this run has "
                f"{seat.world_size} of {seat.engine}; resume on the same engine and number of "
                "ranks, or go on with a new optimizer (reset_optimizer: true)"
            )
        if int(rank) == seat.rank:
            found[kind] = stored
    return found


def rebuilt(stored: str, local: Tensor, parameter: Tensor) -> Any:
    """The value that was kept under this kind."""
    _, _, place = stored.partition(_MARK)
    layout = place.split(":")[2:]
    if not layout:
        return local
    if not isinstance(parameter, DTensor):
        raise CheckpointError(f"the optimizer's {stored!r} is a DTensor's, its parameter is none")
    shape = tuple(int(size) for size in layout[1].split("x") if size)
    strides = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    return DTensor.from_local(
        local,
        parameter.device_mesh,
        [_placement(text) for text in layout[0].split(",")],
        run_check=False,
        shape=torch.Size(shape),
        stride=tuple(strides),
    )


def _text(placement: Any) -> str:
    if isinstance(placement, Shard):
        return f"S{placement.dim}"
    return f"P{placement.reduce_op}" if isinstance(placement, Partial) else "R"


def _placement(text: str) -> Any:
    if text[0] == "S":
        return Shard(int(text[1:]))
    return Partial(text[1:]) if text[0] == "P" else Replicate()
