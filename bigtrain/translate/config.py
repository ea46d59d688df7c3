"""What each engine is told: frozen, whole values, never `"auto"`. The types only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

EngineName: TypeAlias = Literal["single", "ddp", "fsdp", "zero1", "zero2", "zero3"]
DTypeName: TypeAlias = Literal["fp32", "bf16", "fp16"]
ENGINE_NAMES: tuple[EngineName, ...] = ("single", "ddp", "fsdp", "zero1", "zero2", "zero3")


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """What a user may ask of an engine beyond TrainingArguments. None: the engine's own default."""

    shard: int | None = None
    """Ranks that share one copy of the model; None: all of them."""
    master_dtype: Literal["fp32", "bf16"] | None = None
    reshard_after_forward: bool | None = None
    cpu_offload: bool | None = None
    wrap_classes: tuple[str, ...] | None = None
    forward_prefetch: int | None = None
    """Layers that FSDP gathers ahead of the one that computes."""
    reduce_each_micro_batch: bool | None = None
    """FSDP: reduce gradients after every micro-batch, so that no rank ever holds them whole."""
    reduce_dtype: DTypeName | None = None
    offload_optimizer: Literal["cpu", "nvme"] | None = None
    offload_parameters: Literal["cpu", "nvme"] | None = None
    nvme_path: str | None = None
    secondary_shard: int | None = None
    """ZeRO++ hpZ: ranks that together keep a second copy of the weights, to gather from."""
    quantized_weights: bool | None = None
    quantized_gradients: bool | None = None


@dataclass(frozen=True, kw_only=True)
class SingleSettings:
    """One process needs no settings."""


@dataclass(frozen=True, kw_only=True)
class DdpSettings:
    """Keyword arguments of `torch.nn.parallel.DistributedDataParallel`."""

    find_unused_parameters: bool = False
    bucket_cap_mb: int | None = None
    broadcast_buffers: bool | None = None
    static_graph: bool = False


@dataclass(frozen=True, kw_only=True)
class FsdpSettings:
    """What `torch.distributed.fsdp.fully_shard` is called with."""

    shard_size: int
    """Ranks that share one copy; below the world size the mesh is replicate × shard (hybrid)."""
    reshard_after_forward: bool = True
    cpu_offload: bool = False
    wrap_classes: tuple[str, ...] = ()
    """Class names of the modules that are sharded one by one; empty: found from the model."""
    forward_prefetch: int = 0
    reduce_each_micro_batch: bool = False


@dataclass(frozen=True, kw_only=True)
class DeepSpeedSettings:
    """The JSON that DeepSpeed is given, complete."""

    zero_stage: Literal[1, 2, 3]
    json: Mapping[str, Any]


EngineSettings: TypeAlias = SingleSettings | DdpSettings | FsdpSettings | DeepSpeedSettings


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """One engine, with its precision and its own settings."""

    name: EngineName
    settings: EngineSettings
    compute_dtype: DTypeName = "fp32"
    master_dtype: DTypeName = "fp32"
    """Precision in which trained parameters are kept between steps."""
    casts_weights: bool = False
    """Engines with whole parameters: weights and inputs are in the compute precision, rather than
    what autocast gives to some operations."""
    reduce_dtype: DTypeName = "fp32"
    """Precision in which gradients are reduced over ranks and accumulated."""


def uses_nvme(config: EngineConfig) -> bool:
    """True where DeepSpeed keeps a part of the state on NVMe."""
    if not isinstance(config.settings, DeepSpeedSettings):
        return False
    zero = config.settings.json["zero_optimization"]
    parts = (zero.get("offload_optimizer"), zero.get("offload_param"))
    return any((part or {}).get("device") == "nvme" for part in parts)


def unsaved(config: EngineConfig) -> str:
    """What DeepSpeed keeps elsewhere than in the optimizer that the loop made, so that the loop's
    checkpoints would not have it; empty for nothing."""
    if not isinstance(config.settings, DeepSpeedSettings):
        return ""
    if uses_nvme(config):
        return "what DeepSpeed keeps on NVMe"
    section = config.settings.json["zero_optimization"].get("offload_optimizer") or {}
    ratio = section.get("ratio", 1.0)
    return f"the two optimizers of offload_optimizer.ratio {ratio}" if ratio < 1 else ""


@dataclass(frozen=True, kw_only=True)
class ArgumentFate:
    """What became of one TrainingArguments field."""

    argument: str
    fate: Literal["mapped", "derived", "loop", "no_effect", "refused"]
    detail: str
    """`mapped`: the engine's key and value. Else: from what, by which part, or why."""


@dataclass(frozen=True, kw_only=True)
class Translation:
    """The engine's config, and the fate of every argument."""

    engine: EngineConfig
    fates: tuple[ArgumentFate, ...] = field(default=())
