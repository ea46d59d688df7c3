"""Engine configs in other tools' words: transformers' `fsdp`, `fsdp_config` and `deepspeed`.

They choose the engine and fill its options. A key that has no counterpart here is refused by
name; none is dropped.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from bigtrain.translate import given_fsdp, given_json
from bigtrain.translate.config import (
    DeepSpeedSettings,
    EngineName,
    EngineOptions,
    EngineSettings,
)


def asked_engine(values: Mapping[str, Any]) -> EngineName | None:
    """The engine that `deepspeed` or `fsdp` among `values` asks for; None if neither is set."""
    if values.get("deepspeed"):
        return given_json.engine(given_json.read_deepspeed(values["deepspeed"]))
    return "fsdp" if values.get("fsdp") else None


def merge(options: EngineOptions, values: Mapping[str, Any]) -> EngineOptions:
    """`options` with what `fsdp` and `fsdp_config` say where the options themselves say nothing."""
    return given_fsdp.merge(options, values)


def implied(values: Mapping[str, Any]) -> dict[str, tuple[Any, str]]:
    """Fields that `values` leave open and a given DeepSpeed JSON fills: value and its key."""
    if not values.get("deepspeed"):
        return {}
    given = given_json.read_deepspeed(values["deepspeed"])
    found = {
        field: (value, key)
        for field, key, value in given_json.implied(given)
        if field not in values
    }
    # DeepSpeed writes 0 and 1 for what TrainingArguments calls false and true.
    for field in ("bf16", "fp16"):
        if field in found:
            found[field] = (bool(found[field][0]), found[field][1])
    return found


def overlay(settings: EngineSettings, values: Mapping[str, Any]) -> EngineSettings:
    """`settings` with the keys of a given DeepSpeed JSON that TrainingArguments has no word for."""
    if not values.get("deepspeed") or not isinstance(settings, DeepSpeedSettings):
        return settings
    given = given_json.read_deepspeed(values["deepspeed"])
    return replace(settings, json=given_json.overlay(settings.json, given))


def unresolved(settings: EngineSettings, values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(field, what is wrong and the fix) for "auto"s that nothing here gives a value for."""
    if values.get("deepspeed") and isinstance(settings, DeepSpeedSettings):
        given = given_json.read_deepspeed(values["deepspeed"])
        for key in given_json.unresolved(given, settings.json):
            yield "deepspeed", f'{key} is "auto" there, and bigtrain has no value for it; say one'


def faults(
    values: Mapping[str, Any], *, engine: EngineName, origins: Mapping[str, str]
) -> Iterator[tuple[str, str]]:
    """(field, what is wrong and the fix) for foreign configs that can't be followed.

    `origins` tell where the run file's own words stand, which they may contradict.
    """
    asked = asked_engine(values)
    field = "deepspeed" if values.get("deepspeed") else "fsdp"
    if asked is not None and asked != engine:
        said = origins.get("engine.name")
        place = f" ({said})" if said else ""
        yield (
            field,
            f"it asks for engine {asked}, but the run's engine is {engine}{place}; "
            "neither wins: leave one out",
        )
    if values.get("fsdp") and values.get("deepspeed"):
        yield "fsdp", "fsdp and deepspeed are both set; keep one of them"
    if values.get("fsdp"):
        yield from given_fsdp.faults(values)
    if values.get("deepspeed"):
        given = given_json.read_deepspeed(values["deepspeed"])
        for why in given_json.faults(given, values, origins=origins):
            yield "deepspeed", why
    yield from _accelerator_faults(values.get("accelerator_config"), engine=engine)


# What accelerate would do with these, the loop does in its own way or not at all: one process has
# nobody to dispatch to, and sharded engines reduce gradients as their own settings say.
_ACCELERATOR_UNREAD: Mapping[str, tuple[str, ...]] = {
    "dispatch_batches": ("ddp", "fsdp", "zero1", "zero2", "zero3"),
    "gradient_accumulation_kwargs": ("fsdp", "zero1", "zero2", "zero3"),
    "use_configured_state": ("single", "ddp", "fsdp", "zero1", "zero2", "zero3"),
}


def _accelerator_faults(config: Any, *, engine: EngineName) -> Iterator[tuple[str, str]]:
    """`config`: a mapping, JSON text, a file's path, or accelerate's own object."""
    if isinstance(config, str):
        config = given_json.read(config, "accelerator_config")
    for key, engines in _ACCELERATOR_UNREAD.items():
        if engine not in engines:
            continue
        is_mapping = isinstance(config, Mapping)
        value = config.get(key) if is_mapping else getattr(config, key, None)
        if value:
            yield "accelerator_config", f"{key}: {value!r} is not supported; leave it out"
