"""A training step as moments, each with what an engine holds then beside its lasting state.

Every engine gathers, keeps and reduces gradients in its own rhythm; the activations rise and fall
in the same way on all of them. The peak is the largest sum. What each engine allocates when was
read from torch/distributed/fsdp/_fully_shard/ and deepspeed/runtime/, and measured.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from bigtrain.memory.activations import ActivationTimeline
from bigtrain.memory.shapes import ModelShapes, elements
from bigtrain.memory.state import Placement, StateBytes
from bigtrain.translate.config import (
    DdpSettings,
    DeepSpeedSettings,
    FsdpSettings,
    SingleSettings,
)


@dataclass(frozen=True, kw_only=True)
class Moment:
    """One point of a step on one rank."""

    name: str
    activations: int
    gradients: int
    """Of parameters, whole or in parts, that exist by now."""
    communication: int
    """Gathered weights, and buffers that come and go."""

    @property
    def total(self) -> int:
        return self.activations + self.gradients + self.communication


@dataclass(frozen=True, kw_only=True)
class Step:
    """What a timeline is made of."""

    shapes: ModelShapes
    place: Placement
    state: StateBytes
    activations: ActivationTimeline
    accumulation: int
    on_gpu: bool

    @property
    def root(self) -> int:
        """Elements outside of the layers."""
        return elements(self.shapes.units[0])

    @property
    def layers(self) -> list[int]:
        return [elements(unit) for unit in self.shapes.units[1:]]

    @property
    def layer(self) -> int:
        """Elements of the largest layer."""
        return max(self.layers, default=0)

    @property
    def head(self) -> int:
        """Elements of the matrix that makes the logits, or embeds the tokens."""
        return max((parameter.numel for parameter in self.shapes.units[0]), default=0)

    def trained(self, numel: int) -> int:
        """As much of `numel` as is trained, on average over the model."""
        return numel * self.shapes.trained_numel // max(1, self.shapes.numel)


def moments(step: Step) -> Iterator[Moment]:
    """The moments of the last micro-batch of a step and of its update, in order."""
    rhythm = _RHYTHMS[type(step.place.config.settings)]
    yield from rhythm(step)


def _whole(step: Step, *, buckets: int = 0) -> Iterator[Moment]:
    """`single` and `ddp`: gradients appear whole, one layer after the other, and stay."""
    width, full = step.place.master_bytes, step.state.gradients
    before = full if step.accumulation > 1 else 0
    grown = width * step.trained(step.head)
    yield Moment(name="loss", activations=step.activations.head, gradients=before, communication=0)
    count = len(step.layers)
    for done in (1, *((count,) if count > 1 else ())):
        grown = min(full, width * step.trained(step.head + done * step.layer))
        yield Moment(
            name=_layer_name(done, count),
            activations=step.activations.in_layer(count - done),
            gradients=max(before, grown),
            communication=0,
        )
    yield Moment(
        name="update",
        activations=0,
        gradients=full,
        communication=_update_temporaries(step),
    )


def _layer_name(done: int, count: int) -> str:
    return f"backward pass of layer {count - done + 1} of {count}"


def _update_temporaries(step: Step) -> int:
    return 0


def _fsdp(step: Step) -> Iterator[Moment]:
    settings = step.place.config.settings
    assert isinstance(settings, FsdpSettings)
    place, count, ranks = step.place, len(step.layers), settings.shard_size
    compute, reduce = place.compute_bytes, place.reduce_bytes
    gathered_root = compute * step.root
    if settings.reshard_after_forward:
        gathered = gathered_root + 2 * compute * step.layer
    else:
        gathered = compute * step.shapes.numel
    accumulated = reduce * step.shapes.trained_numel if step.accumulation > 1 else 0
    sharded = step.state.gradients
    layer, root = step.trained(step.layer), step.trained(step.root)
    head = compute * step.trained(step.head)
    yield Moment(
        name="loss",
        activations=step.activations.head,
        gradients=accumulated,
        communication=gathered if ranks else 0,
    )
    for done in (1, *((count,) if count > 1 else ())):
        shards = sharded * done // max(1, count)
        yield Moment(
            name=_layer_name(done, count),
            activations=step.activations.in_layer(count - done),
            gradients=head + compute * layer + shards + accumulated,
            communication=gathered + (reduce * layer if done > 1 else 0),
        )
    yield Moment(
        name="end of the backward pass",
        activations=step.activations.fixed,
        gradients=compute * root + sharded,
        communication=gathered_root + reduce * (root + layer),
    )
    yield Moment(name="update", activations=0, gradients=sharded, communication=0)


def _deepspeed(step: Step) -> Iterator[Moment]:
    settings = step.place.config.settings
    assert isinstance(settings, DeepSpeedSettings)
    rhythm = {1: _zero1, 2: _zero2, 3: _zero3}[settings.zero_stage]
    yield from rhythm(step, settings.json["zero_optimization"])


def _zero1(step: Step, zero: Mapping[str, int]) -> Iterator[Moment]:
    yield from _zero12(step, zero, keeps_all=True)


def _zero2(step: Step, zero: Mapping[str, int]) -> Iterator[Moment]:
    yield from _zero12(step, zero, keeps_all=False)


def _zero12(step: Step, zero: Mapping[str, int], *, keeps_all: bool) -> Iterator[Moment]:
    place, count = step.place, len(step.layers)
    compute = place.compute_bytes
    trained = step.shapes.trained_numel
    is_bf16_optimizer = keeps_all and place.config.compute_dtype == "bf16"
    lasting = 4 * trained if is_bf16_optimizer else 0
    bucket = (
        0
        if is_bf16_optimizer
        else place.reduce_bytes
        * min(zero["reduce_bucket_size"], trained)
        * (2 if step.on_gpu else 1)
    )
    own = trained * 4 // place.topology.world_size
    full = compute * trained if keeps_all else own
    yield Moment(
        name="loss", activations=step.activations.head, gradients=lasting, communication=bucket
    )
    for done in (1, *((count,) if count > 1 else ())):
        numel = step.trained(step.head + done * step.layer)
        grown = (
            compute * numel
            if keeps_all
            else compute * step.trained(step.layer) + own * done // count
        )
        yield Moment(
            name=_layer_name(done, count),
            activations=step.activations.in_layer(count - done),
            gradients=lasting + grown,
            communication=bucket,
        )
    yield Moment(
        name="end of the backward pass",
        activations=step.activations.fixed,
        gradients=lasting + full,
        communication=bucket,
    )
    yield Moment(name="update", activations=0, gradients=lasting + own, communication=own)


def _zero3(step: Step, zero: Mapping[str, int]) -> Iterator[Moment]:
    place, count = step.place, len(step.layers)
    compute, numel = place.compute_bytes, step.shapes.numel
    live = min(numel, zero["stage3_max_live_parameters"] + step.layer)
    gathered = compute * live if place.topology.world_size > 1 else 0
    grads = step.state.gradients
    yield Moment(
        name="loss", activations=step.activations.head, gradients=grads, communication=gathered
    )
    for done in (1, *((count,) if count > 1 else ())):
        yield Moment(
            name=_layer_name(done, count),
            activations=step.activations.in_layer(count - done),
            gradients=grads + compute * step.trained(step.layer),
            communication=gathered,
        )
    yield Moment(
        name="end of the backward pass",
        activations=step.activations.fixed,
        gradients=grads + compute * step.trained(step.head),
        communication=gathered,
    )
    yield Moment(name="update", activations=0, gradients=grads, communication=0)


_RHYTHMS: Mapping[type, Callable[[Step], Iterator[Moment]]] = {
    SingleSettings: _whole,
    DdpSettings: _whole,
    FsdpSettings: _fsdp,
    DeepSpeedSettings: _deepspeed,
}
