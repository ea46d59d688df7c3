"""A training step as moments, each with what an engine holds then beside its lasting state.

Every engine gathers, keeps and reduces gradients in its own rhythm; the activations rise and fall
in the same way on all of them. The peak is the largest sum. What each engine allocates when was
read from torch/distributed/fsdp/_fully_shard/ and deepspeed/runtime/, and measured.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bigtrain.memory.activations import ActivationTimeline
from bigtrain.memory.shapes import ModelShapes, elements
from bigtrain.memory.state import Placement, StateBytes
from bigtrain.translate.config import (
    DdpSettings,
    DeepSpeedSettings,
    FsdpSettings,
    SingleSettings,
)

LOSS, UPDATE, EVALUATION = "loss", "update", "evaluation"
_FLATTENED_AT_ONCE = 500_000_000
"""Elements (deepspeed/runtime/engine.py, `MEMORY_OPT_ALLREDUCE_SIZE`)."""


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

    @property
    def widest(self) -> int:
        """Elements of the largest parameter in a layer."""
        inner = (p.numel for unit in self.shapes.units[1:] for p in unit)
        return max(inner, default=0)

    @property
    def tied(self) -> int:
        """Elements of the embedding, where it makes the logits too; else 0.

        Its two gradients and their sum are there at once, at the end of the backward pass.
        """
        largest = [p for p in self.shapes.units[0] if p.numel == self.head]
        return self.head if len(largest) == 1 else 0

    def trained(self, numel: int) -> int:
        """As much of `numel` as is trained, on average over the model."""
        return numel * self.shapes.trained_numel // max(1, self.shapes.numel)


def moments(step: Step) -> Iterator[Moment]:
    """The moments of the last micro-batch of a step and of its update, in order."""
    rhythm = _RHYTHMS[type(step.place.config.settings)]
    yield from rhythm(step)


def evaluation(step: Step, training: Sequence[Moment], *, activations: int) -> Moment:
    """Between two steps, whose moments are `training`: gradients are let go, but for those that
    DeepSpeed keeps in buffers of its own; weights are gathered as for training."""
    keeps = isinstance(step.place.config.settings, DeepSpeedSettings)
    return Moment(
        name=EVALUATION,
        activations=activations,
        gradients=training[-1].gradients if keeps else 0,
        communication=training[0].communication,
    )


def _whole(step: Step) -> Iterator[Moment]:
    """`single` and `ddp`: gradients appear whole, one layer after the other, and stay."""
    width, full = step.place.master_bytes, step.state.gradients
    before = full if step.accumulation > 1 else 0
    yield _loss(step, gradients=before)
    for done, name, activations in _backward(step):
        grown = min(full, width * step.trained(step.head + done * step.layer))
        yield Moment(
            name=name, activations=activations, gradients=max(before, grown), communication=0
        )
    yield _end(step, gradients=full + 2 * width * step.trained(step.tied))
    yield Moment(name=UPDATE, activations=0, gradients=full, communication=0)


def _fsdp(step: Step) -> Iterator[Moment]:
    """Layers are gathered two at a time, and their gradients reduced one behind the other.

    The root's own parameters stay gathered from the first use to the last. Without a sync between
    micro-batches, gradients accumulate whole in the reduce precision, and go layer by layer in the
    last backward pass.
    """
    settings = step.place.config.settings
    assert isinstance(settings, FsdpSettings)
    place, sharded = step.place, step.state.gradients
    compute, reduce = place.compute_bytes, place.reduce_bytes
    root = compute * step.root
    ahead = 1 + settings.forward_prefetch
    gathered = root + compute * step.layer * ahead
    if not settings.reshard_after_forward:
        gathered = compute * step.shapes.numel
    accumulates = step.accumulation > 1 and not settings.reduce_each_micro_batch
    whole = reduce * step.shapes.trained_numel if accumulates else 0
    layer = step.trained(step.layer)
    yield _loss(step, gradients=whole, communication=gathered)
    for done, name, activations in _backward(step):
        reduced = (done - 1) / max(1, len(step.layers))
        shards, waiting = int(sharded * reduced), int(whole * (1 - reduced))
        yield Moment(
            name=name,
            activations=activations,
            gradients=compute * (step.trained(step.head) + layer) + shards + waiting,
            communication=max(gathered, root + 2 * compute * step.layer)
            + (reduce * layer if done > 1 else 0),
        )
    yield _end(
        step,
        gradients=compute * step.trained(step.root + 2 * step.tied) + sharded,
        communication=root + reduce * step.trained(step.root) + reduce * layer,
    )
    yield Moment(name=UPDATE, activations=0, gradients=sharded, communication=0)


def _zero12(step: Step, zero: Mapping[str, Any]) -> Iterator[Moment]:
    is_offloaded_ = is_offloaded(zero, "offload_optimizer") and step.on_gpu
    own = 0 if is_offloaded_ else 4 * step.shapes.trained_numel // step.place.topology.world_size
    if zero["stage"] == 2:
        yield from _zero2(step, zero, own)
    elif step.place.config.compute_dtype == "bf16" and own:
        yield from _bf16_optimizer(step)
    else:
        yield from _zero1(step, zero, own)


def _bf16_optimizer(step: Step) -> Iterator[Moment]:
    """ZeRO-1 in bf16: all gradients last in fp32, and those of a backward pass in bf16 until its
    end, when the fp32 ones are copied into one flat tensor to be summed (engine.py,
    `buffered_allreduce_fallback`)."""
    trained, compute = step.shapes.trained_numel, step.place.compute_bytes
    lasting = 4 * trained
    yield _loss(step, gradients=lasting)
    for done, name, activations in _backward(step):
        kept = compute * step.trained(step.head + done * step.layer)
        yield Moment(name=name, activations=activations, gradients=lasting + kept, communication=0)
    yield _end(
        step,
        gradients=lasting + compute * trained,
        communication=4 * min(trained, _FLATTENED_AT_ONCE),
    )
    yield Moment(name=UPDATE, activations=0, gradients=lasting, communication=0)


def _zero1(step: Step, zero: Mapping[str, Any], own: int) -> Iterator[Moment]:
    """Gradients stay whole until the last backward pass ends; then this rank's part is copied."""
    full = step.place.compute_bytes * step.shapes.trained_numel
    before = full if step.accumulation > 1 else 0
    communication = _buckets(step, zero)
    yield _loss(step, gradients=before, communication=communication)
    for done, name, activations in _backward(step):
        grown = step.place.compute_bytes * step.trained(step.head + done * step.layer)
        yield Moment(
            name=name,
            activations=activations,
            gradients=max(before, grown),
            communication=communication,
        )
    yield _end(step, gradients=full + own, communication=communication)
    yield Moment(name=UPDATE, activations=0, gradients=own, communication=own)


def _zero2(step: Step, zero: Mapping[str, Any], own: int) -> Iterator[Moment]:
    """This rank's part of the gradients is there at once when the first is ready. In bf16 it is in
    fp32, and beside it stay this rank's bf16 gradients of parameters too large for a bucket."""
    place, compute = step.place, step.place.compute_bytes
    is_cast = compute < place.reduce_bytes
    large = sum(p.numel for p in step.shapes.parameters if p.numel > zero["reduce_bucket_size"])
    stale = compute * step.trained(large) // place.topology.world_size if is_cast and own else 0
    before = own if step.accumulation > 1 else 0
    communication = _buckets(step, zero)
    yield _loss(step, gradients=before, communication=communication)
    for done, name, activations in _backward(step):
        left = stale * done // len(step.layers)
        yield Moment(
            name=name,
            activations=activations,
            gradients=own + left + compute * step.trained(step.layer),
            communication=communication + (place.reduce_bytes * step.widest if is_cast else 0),
        )
    yield _end(
        step,
        gradients=own + stale + compute * step.trained(step.head),
        communication=communication + (place.reduce_bytes * step.head if is_cast else 0),
    )
    copied = 0 if is_cast else own
    yield Moment(name=UPDATE, activations=0, gradients=own + stale, communication=copied)


def _buckets(step: Step, zero: Mapping[str, Any]) -> int:
    """The buffers that small gradients are gathered in; two where reducing overlaps."""
    numel = min(int(zero["reduce_bucket_size"]), step.shapes.trained_numel)
    return step.place.compute_bytes * numel * (2 if zero["overlap_comm"] else 1)


def _zero3(step: Step, zero: Mapping[str, Any]) -> Iterator[Moment]:
    """Gathered weights stay as long as they will be used again within `max_reuse_distance`, up to
    `max_live_parameters`: all of a small model's do."""
    place, gradients = step.place, step.state.gradients
    compute = place.compute_bytes
    live = min(step.shapes.numel, zero["stage3_max_live_parameters"] + step.layer)
    gathered = compute * live if place.topology.world_size > 1 else 0
    layer = compute * step.trained(step.layer)
    yield _loss(step, gradients=gradients, communication=gathered)
    for _, name, activations in _backward(step):
        yield Moment(
            name=name,
            activations=activations,
            gradients=gradients + layer,
            communication=gathered,
        )
    head = compute * step.trained(step.head)
    yield _end(step, gradients=gradients + head, communication=gathered)
    yield Moment(name=UPDATE, activations=0, gradients=gradients, communication=0)


def _deepspeed(step: Step) -> Iterator[Moment]:
    settings = step.place.config.settings
    assert isinstance(settings, DeepSpeedSettings)
    rhythm = _zero3 if settings.zero_stage == 3 else _zero12
    yield from rhythm(step, settings.json["zero_optimization"])


def _backward(step: Step) -> Iterator[tuple[int, str, int]]:
    """Layers done with (this one among them), its name, and the activations in it: the last layer
    and the first, between which everything grows or falls evenly."""
    count = len(step.layers)
    for done in dict.fromkeys((1, count)) if count else ():
        name = f"backward pass of layer {count - done + 1} of {count}"
        yield done, name, step.activations.in_layer(count - done)


def _loss(step: Step, *, gradients: int, communication: int = 0) -> Moment:
    return Moment(
        name=LOSS,
        activations=step.activations.head,
        gradients=gradients,
        communication=communication,
    )


def _end(step: Step, *, gradients: int, communication: int = 0) -> Moment:
    return Moment(
        name="end of the backward pass",
        activations=step.activations.fixed,
        gradients=gradients,
        communication=communication,
    )


def is_offloaded(zero: Mapping[str, Any], part: str) -> bool:
    """Whether DeepSpeed's `zero_optimization` sends this part to the host or to NVMe."""
    return bool((zero.get(part) or {}).get("device", "none") != "none")


_RHYTHMS: Mapping[type, Callable[[Step], Iterator[Moment]]] = {
    SingleSettings: _whole,
    DdpSettings: _whole,
    FsdpSettings: _fsdp,
    DeepSpeedSettings: _deepspeed,
}
