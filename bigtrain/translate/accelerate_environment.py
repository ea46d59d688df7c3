"""The variables by which accelerate learns of an engine, for scripts that know nothing of bigtrain.

transformers' Trainer (and all that extends it) and `accelerate.Accelerator` read them when they are
made: accelerate/utils/launch.py writes the same ones for `accelerate launch`. What the script says
itself of its batch, clipping and schedule stays the script's: DeepSpeed's "auto"s are resolved
there.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any, Literal

from bigtrain.translate import foreign
from bigtrain.translate.config import (
    DeepSpeedSettings,
    EngineConfig,
    EngineOptions,
    FsdpSettings,
)

# What accelerate has no variable for.
_NOT_TOLD: Mapping[str, tuple[str, str]] = {
    "shard": ("fsdp", "accelerate shards over all ranks"),
    "forward_prefetch": ("fsdp", "accelerate has no variable for it"),
    "reduce_each_micro_batch": ("fsdp", "accelerate has no variable for it"),
    "reduce_dtype": ("fsdp", "accelerate reduces in the precision that computes"),
    "master_dtype": ("fsdp", "accelerate keeps fp32 masters"),
}
SAID_BY_SCRIPT: Mapping[str, str] = {
    "train_micro_batch_size_per_gpu": "per_device_train_batch_size",
    "gradient_accumulation_steps": "gradient_accumulation_steps",
    "gradient_clipping": "max_grad_norm",
}
"""DeepSpeed's key → the argument by which the script says it, unless the launcher did."""
DEVICE_VARIABLE = "ACCELERATE_TORCH_DEVICE"


def faults(config: EngineConfig, options: EngineOptions) -> Iterator[tuple[str, str]]:
    """(engine key, what is wrong and the fix) for options that a script would not hear of."""
    for key, (engine, why) in _NOT_TOLD.items():
        if engine == config.name and getattr(options, key) is not None:
            yield key, f"{why}; leave it out, or use bigtrain's Trainer in the script"


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
    """The whole JSON, in which the script fills what only it knows (accelerate takes a file's path
    or the text itself: accelerate/utils/deepspeed.py, `HfDeepSpeedConfig`)."""
    given = dict(settings.json)
    for key, argument in SAID_BY_SCRIPT.items():
        if argument not in training:
            given[key] = "auto"
    size = foreign.global_batch(training, {})
    given["train_batch_size"] = size[0] if size else "auto"
    for dtype in ("bf16", "fp16"):
        given[dtype] = {**given[dtype], "enabled": "auto"}
    if settings.zero_stage == 3:  # its own saving has nothing else to gather the weights by
        gathers = {"stage3_gather_16bit_weights_on_model_save": True}
        given["zero_optimization"] = {**given["zero_optimization"], **gathers}
    return {
        "ACCELERATE_USE_DEEPSPEED": "true",
        "ACCELERATE_DEEPSPEED_CONFIG_FILE": json.dumps(given),
        "ACCELERATE_DEEPSPEED_ZERO3_INIT": _word(settings.zero_stage == 3),
    }


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
