"""What an engine keeps on one rank from step to step, in bytes, as its live tensors have it.

Padding is counted as the engines pad: FSDP2 rounds a parameter's first dimension up to the ranks
(torch/distributed/fsdp/_fully_shard/_fsdp_param.py), ZeRO-1 and -2 a group's flat buffer to twice
the ranks (deepspeed/runtime/zero/stage_1_and_2.py, bf16_optimizer.py), ZeRO-3 every parameter to
the ranks (partition_parameters.py). A test compares each number with the engines' own tensors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields

from bigtrain.memory.optimizers import OptimizerShape
from bigtrain.memory.shapes import BYTES, ModelShapes, Parameter, elements
from bigtrain.topology import Topology
from bigtrain.translate.config import (
    DdpSettings,
    DeepSpeedSettings,
    EngineConfig,
    FsdpSettings,
    SingleSettings,
)


@dataclass(frozen=True, kw_only=True)
class StateBytes:
    """One rank's lasting memory. `gradients`: after the last backward pass, before the step."""

    weights: int = 0
    """What forward passes compute with, or gather it from."""
    masters: int = 0
    """Copies in the precision that training keeps, where the weights are not in it."""
    gradients: int = 0
    optimizer: int = 0
    buffers: int = 0
    """Communication buffers that stay."""

    @property
    def total(self) -> int:
        return sum(getattr(self, field.name) for field in fields(self))


@dataclass(frozen=True, kw_only=True)
class Placement:
    """A rank of a run on an engine, with the optimizer's shape."""

    config: EngineConfig
    topology: Topology
    optimizer: OptimizerShape
    rank: int = 0

    @property
    def compute_bytes(self) -> int:
        return BYTES[self.config.compute_dtype]

    @property
    def master_bytes(self) -> int:
        return BYTES[self.config.master_dtype]

    @property
    def reduce_bytes(self) -> int:
        return BYTES[self.config.reduce_dtype]


def state_bytes(shapes: ModelShapes, place: Placement) -> StateBytes:
    """The lasting memory of `place.rank`, wherever it lies (offload is `estimate`'s affair)."""
    count = _COUNTERS[type(place.config.settings)]
    return count(shapes, place)


def flat_groups(shapes: ModelShapes) -> list[list[Parameter]]:
    """The optimizer's two groups of trained parameters, as transformers makes them; none empty."""
    trained = [parameter for parameter in shapes.parameters if parameter.trained]
    groups = ([p for p in trained if p.is_decayed], [p for p in trained if not p.is_decayed])
    return [group for group in groups if group]


def _whole(shapes: ModelShapes, place: Placement) -> StateBytes:
    """`single`: the trained parameters are the masters themselves."""
    trained = shapes.trained_numel
    tensors = sum(1 for parameter in shapes.parameters if parameter.trained)
    return StateBytes(
        weights=trained * place.master_bytes + _frozen(shapes),
        gradients=trained * place.master_bytes,
        optimizer=_moments(trained, tensors, place),
    )


def _ddp(shapes: ModelShapes, place: Placement) -> StateBytes:
    """As `single`, and buckets that hold every gradient a second time (torch's Reducer)."""
    whole = _whole(shapes, place)
    return StateBytes(
        weights=whole.weights,
        gradients=whole.gradients,
        optimizer=whole.optimizer,
        buffers=whole.gradients,
    )


def _fsdp(shapes: ModelShapes, place: Placement) -> StateBytes:
    ranks = place.topology.shard_size
    trained = [parameter for parameter in shapes.parameters if parameter.trained]
    padded = sum(_padded_rows(parameter, ranks) for parameter in trained)
    held = sum(_own_rows(parameter, ranks, place.rank % ranks) for parameter in trained)
    frozen = sum(
        _padded_rows(parameter, ranks) * BYTES[parameter.dtype]
        for parameter in shapes.parameters
        if not parameter.trained
    )
    return StateBytes(
        weights=padded * place.master_bytes + frozen,
        gradients=padded * place.master_bytes,
        optimizer=_moments(held, len(trained), place),
    )


def _padded_rows(parameter: Parameter, ranks: int) -> int:
    rows = parameter.shape[0] if parameter.shape else 1
    return math.ceil(rows / ranks) * (parameter.numel // max(rows, 1))


def _own_rows(parameter: Parameter, ranks: int, rank: int) -> int:
    """Elements without padding: `torch.chunk` gives the last ranks less, or nothing."""
    rows = parameter.shape[0] if parameter.shape else 1
    chunk = math.ceil(rows / ranks)
    return max(0, min(chunk, rows - rank * chunk)) * (parameter.numel // max(rows, 1))


def _zero(shapes: ModelShapes, place: Placement) -> StateBytes:
    settings = place.config.settings
    stage = settings.zero_stage if isinstance(settings, DeepSpeedSettings) else 0
    return _zero3(shapes, place) if stage == 3 else _zero12(shapes, place, stage)


def _zero12(shapes: ModelShapes, place: Placement, stage: int) -> StateBytes:
    """Whole weights in the compute precision; masters and moments of one part of each group."""
    ranks, compute = place.topology.world_size, place.compute_bytes
    groups = flat_groups(shapes)
    flats = [_rounded(elements(group), 2 * ranks) for group in groups]
    part = sum(flats) // ranks
    frozen = sum(p.numel for p in shapes.parameters if not p.trained) * compute
    if place.config.compute_dtype == "fp32":  # the model is left as it was loaded
        frozen = _frozen(shapes)
    return StateBytes(
        weights=sum(flats) * compute + frozen,
        masters=part * 4,
        gradients=_zero12_gradients(groups, flats, place, stage),
        optimizer=_moments(part, len(groups), place),
    )


def _zero12_gradients(
    groups: list[list[Parameter]], flats: list[int], place: Placement, stage: int
) -> int:
    ranks, dtype = place.topology.world_size, place.config.compute_dtype
    if stage == 1 and dtype == "bf16":
        # BF16_Optimizer: all in fp32, and those of the last backward pass in bf16 as well.
        return sum(flats) * 4 + sum(elements(group) for group in groups) * 2
    if stage == 1 and dtype == "fp16":
        return sum(elements(group) for group in groups) * 4
    if dtype != "fp32":
        return sum(flats) // ranks * 4
    # The gradients themselves are kept, whole where a part's border cuts them.
    return 4 * sum(
        _overlapping(group, flat // ranks, place.rank)
        for group, flat in zip(groups, flats, strict=True)
    )


def _overlapping(group: Iterable[Parameter], part: int, rank: int) -> int:
    begin, end, offset, kept = rank * part, (rank + 1) * part, 0, 0
    for parameter in group:
        if offset < end and offset + parameter.numel > begin:
            kept += parameter.numel
        offset += parameter.numel
    return kept + max(0, end - max(offset, begin))


def _zero3(shapes: ModelShapes, place: Placement) -> StateBytes:
    """Every parameter is cut; small ones stay gathered beside their parts."""
    ranks, compute = place.topology.world_size, place.compute_bytes
    trained = [parameter for parameter in shapes.parameters if parameter.trained]
    part = sum(math.ceil(parameter.numel / ranks) for parameter in trained)
    cut = part + sum(math.ceil(p.numel / ranks) for p in shapes.parameters if not p.trained)
    zero = _zero_section(place)
    threshold = zero["stage3_param_persistence_threshold"]
    # Gathered into buffers of whole parts, whose padding stays; a rank alone has them already.
    small = [p for p in shapes.parameters if p.numel <= threshold and ranks > 1]
    persistent = ranks * sum(math.ceil(p.numel / ranks) for p in small)
    return StateBytes(
        weights=(cut + persistent) * compute,
        masters=part * 4,
        gradients=part * 4,
        optimizer=_moments(part, _sub_groups(shapes, ranks, zero["sub_group_size"]), place),
        buffers=zero["reduce_bucket_size"] * place.reduce_bytes,
    )


def _zero_section(place: Placement) -> Mapping[str, int]:
    settings = place.config.settings
    assert isinstance(settings, DeepSpeedSettings)
    section: Mapping[str, int] = settings.json["zero_optimization"]
    return section


def _sub_groups(shapes: ModelShapes, ranks: int, size: int) -> int:
    """Flat groups that the optimizer sees: each of its groups, cut where `size` is reached."""
    count = 0
    for group in flat_groups(shapes):
        parts = [math.ceil(parameter.numel / ranks) for parameter in group]
        running = 0
        if size >= sum(parts):
            count += 1
            continue
        for index, part in enumerate(parts):
            running += part
            if running >= size or index == len(parts) - 1:
                count, running = count + 1, 0
    return count


def _moments(numel: int, tensors: int, place: Placement) -> int:
    shape = place.optimizer
    width = shape.bytes_per_element or place.master_bytes
    return int(shape.moments * numel * width) + tensors * shape.step_bytes


def _frozen(shapes: ModelShapes) -> int:
    return sum(p.bytes_loaded for p in shapes.parameters if not p.trained)


def _rounded(number: int, step: int) -> int:
    return -(-number // step) * step


_COUNTERS: Mapping[type, Callable[[ModelShapes, Placement], StateBytes]] = {
    SingleSettings: _whole,
    DdpSettings: _ddp,
    FsdpSettings: _fsdp,
    DeepSpeedSettings: _zero,
}
