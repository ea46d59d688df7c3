"""The memory of one rank: what lasts, what comes and goes, the peak, and what is left of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from bigtrain.memory.activations import (
    ActivationTimeline,
    Batch,
    FormulaActivations,
    activation_bytes,
    evaluation_bytes,
)
from bigtrain.memory.optimizers import optimizer_name, optimizer_shape
from bigtrain.memory.shapes import BYTES, ModelShapes
from bigtrain.memory.state import Placement, StateBytes, state_bytes
from bigtrain.memory.timeline import Moment, Step, evaluation, is_offloaded, moments
from bigtrain.topology import Topology
from bigtrain.translate.config import DeepSpeedSettings, EngineConfig, FsdpSettings


@dataclass(frozen=True, kw_only=True)
class Request:
    """Whose memory is asked for. `training`: TrainingArguments that were said or derived."""

    shapes: ModelShapes
    config: EngineConfig
    topology: Topology
    device: Literal["cpu", "cuda"]
    training: Mapping[str, Any]
    sequence_length: int
    evaluates: bool = False
    """Whether the run evaluates, on batches of their own size."""

    @property
    def recompute(self) -> bool:
        return bool(
            self.training.get("gradient_checkpointing")
            or self.training.get("activation_checkpointing")
        )

    @property
    def accumulation(self) -> int:
        return int(self.training.get("gradient_accumulation_steps") or 1)

    def placement(self) -> Placement:
        optimizer = optimizer_shape(optimizer_name(self.training))
        return Placement(config=self.config, topology=self.topology, optimizer=optimizer)

    def batch(self, key: str = "per_device_train_batch_size") -> Batch:
        """What goes through the model at once, in training or else in an evaluation."""
        compute = BYTES[self.config.compute_dtype]
        # Sharded engines cast as they gather, which is no copy of its own.
        casts = self.config.name in ("single", "ddp") and compute < BYTES[self.config.master_dtype]
        return Batch(
            sequences=int(self.training.get(key) or 8),
            sequence_length=self.sequence_length,
            compute_bytes=compute,
            is_autocast=casts and not self.config.casts_weights,
            copies_weights=casts
            and 2 * _frozen_as_computed(self.shapes, compute) < self.shapes.numel,
            keeps_logits=not self.training.get("use_liger_kernel"),
        )


def _frozen_as_computed(shapes: ModelShapes, compute_bytes: int) -> int:
    """Elements that are not trained and no wider than the arithmetic."""
    return sum(
        parameter.numel
        for parameter in shapes.parameters
        if not parameter.trained and BYTES[parameter.dtype] <= compute_bytes
    )


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """Bytes on rank 0, which holds as much as any other."""

    state: StateBytes
    """On the device; what is offloaded is not in it."""
    moments: tuple[Moment, ...]
    method: Literal["formula", "trace"]
    activations: int
    """Of one micro-batch, when its loss is known; without the logits."""
    logits: int
    """Logits with their gradients, at their largest; with `trace` they are in `activations`."""
    host: int = 0
    """Offloaded state in the host's memory, and buffers through which it goes to NVMe."""
    nvme: int = 0
    """Offloaded state on NVMe."""

    @property
    def lasting(self) -> int:
        """What is there all the time: all but gradients."""
        return self.state.total - self.state.gradients

    @property
    def peak_moment(self) -> Moment:
        return max(self.moments, key=lambda moment: moment.total)

    @property
    def peak(self) -> int:
        return self.lasting + self.peak_moment.total

    def parts(self) -> dict[str, int]:
        """The peak, by what it is made of."""
        at = self.peak_moment
        return {
            "weights": self.state.weights,
            "masters": self.state.masters,
            "optimizer": self.state.optimizer,
            "buffers": self.state.buffers,
            "gradients": at.gradients,
            "communication": at.communication,
            "activations": at.activations,
        }


def estimate(request: Request) -> MemoryPlan | None:
    """The memory of a step by formula; None where the model's widths are not known."""
    shape = request.shapes.architecture
    if shape is None:
        return None
    each = activation_bytes(shape, request.batch())
    activations = FormulaActivations(each=each, layers=shape.layers, recompute=request.recompute)
    return plan_with(request, activations, method="formula")


def plan_with(
    request: Request, activations: ActivationTimeline, *, method: Literal["formula", "trace"]
) -> MemoryPlan:
    """The memory of a step whose activations are known."""
    place = request.placement()
    whole = state_bytes(request.shapes, place)
    state = _on_device(whole, request)
    nvme = _on_nvme(whole, request)
    step = Step(
        shapes=request.shapes,
        place=place,
        state=state,
        activations=activations,
        accumulation=request.accumulation,
        on_gpu=request.device == "cuda",
    )
    logits = getattr(activations, "logits", 0)
    training = tuple(moments(step))
    return MemoryPlan(
        state=state,
        moments=(*training, *_evaluation(request, step, training)),
        method=method,
        activations=activations.head - logits,
        logits=logits,
        host=whole.total - state.total - nvme + _swap_buffers(request),
        nvme=nvme,
    )


def _evaluation(request: Request, step: Step, training: tuple[Moment, ...]) -> Iterator[Moment]:
    """By formula, also where training is traced."""
    shape = request.shapes.architecture
    if not request.evaluates or shape is None:
        return
    batch = request.batch("per_device_eval_batch_size")
    activations = evaluation_bytes(shape, batch, layers=shape.layers)
    yield evaluation(step, training, activations=activations)


def _on_nvme(state: StateBytes, request: Request) -> int:
    """Masters and moments, weights, or both; gradients stay in the host's memory."""
    zero = _zero(request)
    return sum(
        size
        for part, size in (
            ("offload_optimizer", state.masters + state.optimizer),
            ("offload_param", state.weights),
        )
        if request.device == "cuda" and _device_of(zero, part) == "nvme"
    )


def _swap_buffers(request: Request) -> int:
    """Pinned buffers of the host through which state moves to and from NVMe: for the optimizer as
    many fp32 tensors of the largest sub-group as it counts, for parameters of `buffer_size`
    (deepspeed/runtime/swap_tensor/partitioned_{optimizer,param}_swapper.py)."""
    zero, found = _zero(request), 0
    if request.device == "cuda" and _device_of(zero, "offload_optimizer") == "nvme":
        own = -(-request.shapes.trained_numel // request.topology.world_size)
        largest = min(own, int(zero["sub_group_size"]))
        found += 4 * largest * int(zero["offload_optimizer"]["buffer_count"])
    if request.device == "cuda" and _device_of(zero, "offload_param") == "nvme":
        part = zero["offload_param"]
        width = BYTES[request.config.compute_dtype]
        found += width * int(part["buffer_count"]) * int(part["buffer_size"])
    return found


def _zero(request: Request) -> Mapping[str, Any]:
    settings = request.config.settings
    if not isinstance(settings, DeepSpeedSettings):
        return {}
    section: Mapping[str, Any] = settings.json["zero_optimization"]
    return section


def _device_of(zero: Mapping[str, Any], part: str) -> str:
    return str((zero.get(part) or {}).get("device", "none"))


def _on_device(state: StateBytes, request: Request) -> StateBytes:
    """Without what the engine offloads; on a CPU there is nowhere else to put it."""
    settings = request.config.settings
    if request.device == "cpu":
        return state
    if isinstance(settings, FsdpSettings) and settings.cpu_offload:
        return replace(state, weights=0, gradients=0, optimizer=0)
    if isinstance(settings, DeepSpeedSettings):
        zero = settings.json["zero_optimization"]
        if is_offloaded(zero, "offload_optimizer"):
            state = replace(state, masters=0, optimizer=0, gradients=0)
        if is_offloaded(zero, "offload_param"):
            state = replace(state, weights=0)
    return state
