"""The variables by which accelerate learns of an engine, for scripts that know nothing of bigtrain.

transformers' Trainer (and all that extends it) and `accelerate.Accelerator` read them when they are
made: accelerate/utils/launch.py writes the same ones for `accelerate launch`. What the script says
itself of its batch, clipping and schedule stays the script's: DeepSpeed's "auto"s are resolved
there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from bigtrain.translate.config import (
    DeepSpeedSettings,
    EngineConfig,
    FsdpSettings,
)

DEVICE_VARIABLE = "ACCELERATE_TORCH_DEVICE"


def variables(
    config: EngineConfig, *, device: Literal["cpu", "cuda"], training: Mapping[str, Any]
) -> dict[str, str]:
    """What the processes of a script need so that accelerate runs `config`."""
    found: dict[str, str] = {}
    if isinstance(config.settings, DeepSpeedSettings):
        found |= _deepspeed(config.settings, training)
    elif isinstance(config.settings, FsdpSettings):
        found |= _fsdp(config.settings, training)
    if config.compute_dtype != "fp32":
        found["ACCELERATE_MIXED_PRECISION"] = config.compute_dtype
    if "gradient_accumulation_steps" in training:
        steps = str(training["gradient_accumulation_steps"])
        found["ACCELERATE_GRADIENT_ACCUMULATION_STEPS"] = steps
    if device == "cpu":
        found |= _on_cpu(is_sharded=bool(found.keys() & _SHARDED))
    return found


_SHARDED = {"ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP"}


def _on_cpu(*, is_sharded: bool) -> dict[str, str]:
    """With `ACCELERATE_USE_CPU` accelerate forgets ZeRO and FSDP; without it, plain ranks take
    themselves for the only one. `cluster/accelerate_on_cpu.py` does the rest."""
    if is_sharded:
        return {DEVICE_VARIABLE: "cpu"}
    return {"ACCELERATE_USE_CPU": "true"}


def _deepspeed(settings: DeepSpeedSettings, training: Mapping[str, Any]) -> dict[str, str]:
    zero = settings.json["zero_optimization"]
    found = {
        "ACCELERATE_USE_DEEPSPEED": "true",
        "ACCELERATE_DEEPSPEED_ZERO_STAGE": str(settings.zero_stage),
        "ACCELERATE_DEEPSPEED_ZERO3_INIT": _word(settings.zero_stage == 3),
        "ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL": _word(settings.zero_stage == 3),
    }
    for part, name in (("offload_optimizer", "OPTIMIZER"), ("offload_param", "PARAM")):
        section = zero.get(part) or {}
        found[f"ACCELERATE_DEEPSPEED_OFFLOAD_{name}_DEVICE"] = section.get("device", "none")
        if section.get("nvme_path"):
            found[f"ACCELERATE_DEEPSPEED_OFFLOAD_{name}_NVME_PATH"] = section["nvme_path"]
    if training.get("max_grad_norm"):
        found["ACCELERATE_GRADIENT_CLIPPING"] = str(training["max_grad_norm"])
    return found


def _fsdp(settings: FsdpSettings, training: Mapping[str, Any]) -> dict[str, str]:
    found = {
        "ACCELERATE_USE_FSDP": "true",
        "FSDP_VERSION": "2",
        "FSDP_RESHARD_AFTER_FORWARD": _word(settings.reshard_after_forward),
        "FSDP_OFFLOAD_PARAMS": _word(settings.cpu_offload),
        "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
        "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
        "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",
        "FSDP_ACTIVATION_CHECKPOINTING": _word(bool(training.get("gradient_checkpointing"))),
    }
    if settings.wrap_classes:
        found["FSDP_TRANSFORMER_CLS_TO_WRAP"] = ",".join(settings.wrap_classes)
    return found


def _word(value: bool) -> str:
    return str(value).lower()
