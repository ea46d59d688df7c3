"""How a global batch is cut into micro-batches."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from bigtrain.errors import ConfigError
from bigtrain.run_config import RunConfig
from bigtrain.topology import Topology

_FIELD = "gradient_accumulation_steps"
_MICRO = "per_device_train_batch_size"


@dataclass(frozen=True, kw_only=True)
class Accumulation:
    """What `global_batch_size` asks for of what was not said, and that it did."""

    argument: str
    """How many micro-batches, or how large each of them is."""
    value: int
    derivation: str


def accumulation(
    config: RunConfig, values: Mapping[str, Any], topology: Topology
) -> Accumulation | None:
    """How many micro-batches a step has, or their size; None without a `global_batch_size`.

    `values` are whole TrainingArguments. Raises ConfigError where it doesn't divide.
    """
    size = config.global_batch_size
    if size is None:
        return None
    if _MICRO not in config.training and config.training.get(_FIELD):
        return _micro_batch(config, size, config.training[_FIELD], topology.world_size)
    micro_batch, world_size = values[_MICRO], topology.world_size
    at_once = micro_batch * world_size
    origin = config.origins["global_batch_size"]
    if size % at_once:
        raise ConfigError(
            f"{origin}: global_batch_size: {size} is not divisible by {micro_batch} "
            f"(training.per_device_train_batch_size) × {world_size} (processes) = {at_once}; "
            f"{_ways_out(size, micro_batch, world_size)}"
        )
    steps = size // at_once
    said = config.training.get(_FIELD)
    if said is not None and said != steps:
        raise ConfigError(
            f"{config.origins[f'training.{_FIELD}']}: training.{_FIELD}: {said}, but "
            f"global_batch_size {size} ({origin}) needs {steps}; leave one of them out"
        )
    return Accumulation(
        argument=_FIELD,
        value=steps,
        derivation=f"global_batch_size {size} ÷ ({micro_batch} × {world_size} processes)",
    )


def _micro_batch(config: RunConfig, size: int, steps: int, world_size: int) -> Accumulation:
    """Of the three, two were said: the third follows."""
    at_once = steps * world_size
    if size % at_once:
        below = size // at_once * at_once
        sizes = " or ".join(str(near) for near in (below, below + at_once) if near)
        raise ConfigError(
            f"{config.origins['global_batch_size']}: global_batch_size: {size} is not divisible by "
            f"{steps} (training.{_FIELD}) × {world_size} (processes) = {at_once}; use {sizes}"
        )
    return Accumulation(
        argument=_MICRO,
        value=size // at_once,
        derivation=f"global_batch_size {size} ÷ ({steps} × {world_size} processes)",
    )


def _ways_out(size: int, micro_batch: int, world_size: int) -> str:
    """The nearest global batches that divide, and the micro-batches with which this one does."""
    at_once = micro_batch * world_size
    below = size // at_once * at_once
    sizes = " or ".join(str(near) for near in (below, below + at_once) if near)
    way = f"use {sizes}"
    if size % world_size == 0:
        share = size // world_size
        fitting = [n for n in range(1, min(share, 4 * micro_batch) + 1) if share % n == 0]
        way += f", or per_device_train_batch_size {', '.join(map(str, fitting))}"
    return way
