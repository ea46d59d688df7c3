"""Engine configs in other tools' words: transformers' `fsdp`, `fsdp_config` and `deepspeed`.

They choose the engine and fill its options. A key that has no counterpart here is refused by
name; none is dropped.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from bigtrain.errors import ConfigError
from bigtrain.translate.config import (
    DeepSpeedSettings,
    EngineName,
    EngineOptions,
    EngineSettings,
)

_ZERO_ENGINES: Mapping[int, EngineName] = {1: "zero1", 2: "zero2", 3: "zero3"}
_FSDP_WORDS = frozenset({"full_shard", "shard_grad_op", "auto_wrap", "offload"})
_FSDP_KEYS: Mapping[str, str] = {
    "reshard_after_forward": "reshard_after_forward",
    "cpu_offload": "cpu_offload",
    "offload_params": "cpu_offload",
    "transformer_layer_cls_to_wrap": "wrap_classes",
}
# Keys that ask for what FSDP2 always does here, with the values that say so.
_FSDP_GRANTED: Mapping[str, tuple[Any, ...]] = {
    "version": (2,),
    "use_orig_params": (True,),
    "sync_module_states": (True,),
    "auto_wrap_policy": ("TRANSFORMER_BASED_WRAP",),
    "cpu_ram_efficient_loading": (True, False),
    "limit_all_gathers": (True,),
    "backward_prefetch": ("backward_pre", "BACKWARD_PRE"),
    "forward_prefetch": (False,),
    "min_num_params": (0,),
    "xla": (False,),
    "xla_fsdp_v2": (False,),
    "xla_fsdp_grad_ckpt": (False,),
}


def asked_engine(values: Mapping[str, Any]) -> EngineName | None:
    """The engine that `deepspeed` or `fsdp` among `values` asks for; None if neither is set."""
    if values.get("deepspeed"):
        stage = _read_json(values["deepspeed"], "deepspeed").get("zero_optimization", {})
        return _ZERO_ENGINES.get(stage.get("stage", 0), "ddp")
    return "fsdp" if values.get("fsdp") else None


def merge(options: EngineOptions, values: Mapping[str, Any]) -> EngineOptions:
    """`options` with what `fsdp` and `fsdp_config` say where the options themselves say nothing."""
    if not values.get("fsdp"):
        return options
    found: dict[str, Any] = {}
    words = _words(values["fsdp"])
    if "shard_grad_op" in words:
        found["reshard_after_forward"] = False
    if "offload" in words:
        found["cpu_offload"] = True
    for key, value in _fsdp_config(values).items():
        if key in _FSDP_KEYS and value is not None:
            found[_FSDP_KEYS[key]] = value
    if isinstance(found.get("wrap_classes"), (str, list)):
        names = found["wrap_classes"]
        found["wrap_classes"] = tuple(names.split(",") if isinstance(names, str) else names)
    unsaid = {key: value for key, value in found.items() if getattr(options, key) is None}
    return replace(options, **unsaid)


def overlay(settings: EngineSettings, values: Mapping[str, Any]) -> EngineSettings:
    """`settings` with the keys of a given DeepSpeed JSON that TrainingArguments has no word for."""
    if not values.get("deepspeed") or not isinstance(settings, DeepSpeedSettings):
        return settings
    given = _read_json(values["deepspeed"], "deepspeed")
    return replace(settings, json=_overlay(settings.json, given))


def faults(values: Mapping[str, Any], *, engine: EngineName) -> Iterator[tuple[str, str]]:
    """(field, what is wrong and the fix) for foreign configs that can't be followed."""
    asked = asked_engine(values)
    field = "deepspeed" if values.get("deepspeed") else "fsdp"
    if asked is not None and asked != engine:
        yield field, f"it asks for engine {asked}, but the run's engine is {engine}; leave one out"
    if values.get("fsdp") and values.get("deepspeed"):
        yield "fsdp", "fsdp and deepspeed are both set; keep one of them"
    if values.get("fsdp"):
        yield from _fsdp_faults(values)
    if values.get("deepspeed"):
        yield from _deepspeed_faults(values)
    yield from _accelerator_faults(values.get("accelerator_config"))


def _words(fsdp: Any) -> list[str]:
    if isinstance(fsdp, str):
        return fsdp.replace(",", " ").split()
    return [str(getattr(word, "value", word)) for word in fsdp] if isinstance(fsdp, list) else []


def _fsdp_config(values: Mapping[str, Any]) -> dict[str, Any]:
    given = values.get("fsdp_config") or {}
    config = _read_json(given, "fsdp_config")
    return {key.removeprefix("fsdp_"): _truth(value) for key, value in config.items()}


def _truth(value: Any) -> Any:
    words = {"true": True, "false": False}
    return words.get(value.lower(), value) if isinstance(value, str) else value


def _fsdp_faults(values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for word in _words(values["fsdp"]):
        if word not in _FSDP_WORDS and word not in ("True", "true"):
            yield "fsdp", f"{word!r} is not supported; use {', '.join(sorted(_FSDP_WORDS))}"
    for key, value in _fsdp_config(values).items():
        if key in _FSDP_KEYS or value is None or value in _FSDP_GRANTED.get(key, ()):
            continue
        if key == "activation_checkpointing":
            if value:
                yield "fsdp_config", f"{key} is said by training.gradient_checkpointing here"
        else:
            yield "fsdp_config", f"{key}: {value!r} has no counterpart in FSDP2 here; leave it out"


# What accelerate would do with these, the loop does in its own way or not at all.
_ACCELERATOR_UNREAD = ("dispatch_batches", "gradient_accumulation_kwargs", "use_configured_state")


def _accelerator_faults(config: Any) -> Iterator[tuple[str, str]]:
    """`config`: a mapping, JSON text, a file's path, or accelerate's own object."""
    if isinstance(config, str):
        config = _read_json(config, "accelerator_config")
    for key in _ACCELERATOR_UNREAD:
        is_mapping = isinstance(config, Mapping)
        value = config.get(key) if is_mapping else getattr(config, key, None)
        if value:
            yield "accelerator_config", f"{key}: {value!r} is not supported; leave it out"


_OWNED_BY_LOOP = {
    "optimizer": "training.optim and its hyperparameters",
    "scheduler": "training.lr_scheduler_type and warmup",
}
_SAID_BY_ARGUMENTS: Mapping[tuple[str, ...], str] = {
    ("train_micro_batch_size_per_gpu",): "per_device_train_batch_size",
    ("gradient_accumulation_steps",): "gradient_accumulation_steps",
    ("gradient_clipping",): "max_grad_norm",
    ("bf16", "enabled"): "bf16",
    ("fp16", "enabled"): "fp16",
}


def _deepspeed_faults(values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    given = _read_json(values["deepspeed"], "deepspeed")
    for section, instead in _OWNED_BY_LOOP.items():
        if section in given:
            yield "deepspeed", f"{section} belongs to the loop; leave it out and set {instead}"
    zero = given.get("zero_optimization", {})
    for key in ("offload_param", "offload_optimizer"):
        if (zero.get(key) or {}).get("device", "none") != "none":
            yield "deepspeed", f"zero_optimization.{key} is not supported; leave it out"
    for path, field in _SAID_BY_ARGUMENTS.items():
        value = _leaf(given, path)
        if value not in (None, "auto") and value != values[field]:
            yield (
                "deepspeed",
                f"{'.'.join(path)} is {value} there, but training.{field} is {values[field]}; "
                'make them equal, or say "auto" there',
            )


def _leaf(config: Any, path: tuple[str, ...]) -> Any:
    for key in path:
        config = config.get(key) if isinstance(config, Mapping) else None
    return config


def _overlay(ours: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """`given` over `ours`; "auto" stays ours, and so does what follows from the topology."""
    merged = dict(ours)
    for key, value in given.items():
        if isinstance(value, Mapping):
            merged[key] = _overlay(ours.get(key, {}), value)
        elif value == "auto" or key == "train_batch_size":
            continue
        else:
            merged[key] = value
    return merged


def _read_json(given: Any, field: str) -> dict[str, Any]:
    """A mapping, JSON text, or the path of a JSON file."""
    if isinstance(given, Mapping):
        return dict(given)
    text = given if str(given).lstrip().startswith("{") else _read_text(Path(given), field)
    try:
        value = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"training.{field}: {given} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ConfigError(f"training.{field}: {given} holds no JSON object")
    return value


def _read_text(path: Path, field: str) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"training.{field}: {path} can't be read ({error.strerror}); give a JSON file"
        ) from error
