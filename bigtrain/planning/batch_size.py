"""How a global batch is cut into micro-batches."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from bigtrain.errors import ConfigError
from bigtrain.run_config import RunConfig
from bigtrain.topology import Topology

_FIELD = "gradient_accumulation_steps"


@dataclass(frozen=True, kw_only=True)
class Accumulation:
    """The number of micro-batches that `global_batch_size` asks for, and that it did."""

    steps: int
    derivation: str


def accumulation(
    config: RunConfig, values: Mapping[str, Any], topology: Topology
) -> Accumulation | None:
    """Micro-batches in one step; None where the run file says no `global_batch_size`.

    `values` are whole TrainingArguments. Raises ConfigError where it doesn't divide.
    """
    size = config.global_batch_size
    if size is None:
        return None
    micro_batch, world_size = values["per_device_train_batch_size"], topology.world_size
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
        steps=steps,
        derivation=f"global_batch_size {size} ÷ ({micro_batch} × {world_size} processes)",
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
