"""Engine configs in other tools' words: transformers' `fsdp`, `fsdp_config` and `deepspeed`.

They choose the engine and fill its options. A key that has no counterpart here is refused by
name; none is dropped.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from bigtrain.arguments.installed import accelerator_keys
from bigtrain.arguments.values import did_you_mean
from bigtrain.topology import Topology
from bigtrain.translate import given_fsdp, given_json, given_json_options
from bigtrain.translate.config import (
    DeepSpeedSettings,
    EngineName,
    EngineOptions,
    EngineSettings,
)
from bigtrain.translate.given import Field, GivenOption, conflicts
from bigtrain.translate.given import merge as _merged
from bigtrain.translate.malformed_json import read_deepspeed, read_what_is_sound


def asked_engine(values: Mapping[str, Any]) -> EngineName | None:
    """The engine that `deepspeed` or `fsdp` among `values` asks for; None if neither is set."""
    if values.get("deepspeed"):
        return given_json.engine(read_deepspeed(values["deepspeed"]))
    return "fsdp" if values.get("fsdp") else None


def sound(values: Mapping[str, Any]) -> tuple[Mapping[str, Any], list[tuple[str, str]]]:
    """`values` without what can't be read of a DeepSpeed JSON, and (key, what is wrong) for that.

    ConfigError where nothing of it can be read.
    """
    if not values.get("deepspeed"):
        return values, []
    given, wrong = read_what_is_sound(values["deepspeed"])
    return ({**values, "deepspeed": given}, wrong) if wrong else (values, [])


def given_options(values: Mapping[str, Any]) -> list[GivenOption]:
    """What `deepspeed`, `fsdp` and `fsdp_config` among `values` say of the engine."""
    found = list(given_fsdp.options(values))
    if values.get("deepspeed"):
        found += given_json_options.options(read_deepspeed(values["deepspeed"]))
    return found


def without_effect(values: Mapping[str, Any]) -> dict[str, list[str]]:
    """Argument → the keys of the config in it from which nothing comes, each with the reason."""
    if not values.get("deepspeed"):
        return {}
    given = read_deepspeed(values["deepspeed"])
    return {"deepspeed": list(given_json_options.without_effect(given))}


def merge(options: EngineOptions, values: Mapping[str, Any]) -> EngineOptions:
    """`options` with what the given configs say where the options themselves say nothing."""
    return _merged(options, given_options(values))


def shards_by_node(values: Mapping[str, Any]) -> bool:
    """Whether `fsdp` or `fsdp_config` ask for hybrid sharding: within each node, replicated over
    the nodes."""
    return given_fsdp.shards_by_node(values)


def implied(values: Mapping[str, Any]) -> dict[str, tuple[Any, str]]:
    """Fields that `values` leave open and the given configs fill: value, and the config's key."""
    return {field: (value, key) for field, _, key, value in _implied(values)}


def _implied(values: Mapping[str, Any]) -> Iterator[tuple[str, Field, str, Any]]:
    """Field, the argument that holds the config which fills it, its key there, and the value."""
    if values.get("deepspeed"):
        for field, key, value in given_json.implied(read_deepspeed(values["deepspeed"])):
            if field not in values:
                yield field, "deepspeed", key, value
    if given_fsdp.recomputes(values) and not values.keys() & _RECOMPUTATION:
        yield "gradient_checkpointing", "fsdp_config", given_fsdp.RECOMPUTATION, True


# Two names of one argument, the older last.
_RECOMPUTATION = ("activation_checkpointing", "gradient_checkpointing")


def implied_origins(values: Mapping[str, Any], origins: Mapping[str, str]) -> dict[str, str]:
    """Where each value stands that the given configs fill: `ds.json: gradient_clipping`."""
    found = {
        f"training.{field}": f"{_place(config, values, origins)}: {key}"
        for field, config, key, _ in _implied(values)
    }
    for said in given_options(values):
        place = _place(said.field, values, origins)
        found[f"engine.{said.option}"] = f"{place}: {said.key}"
    return found


def _place(field: Field, values: Mapping[str, Any], origins: Mapping[str, str]) -> str:
    """A config's file; else where it was written out."""
    value = values[field]
    if isinstance(value, str) and value.endswith(".json"):
        return value
    return origins.get(f"training.{field}", f"training.{field}")


def global_batch(values: Mapping[str, Any], origins: Mapping[str, str]) -> tuple[int, str] | None:
    """The `train_batch_size` of a given DeepSpeed JSON, and where it stands."""
    if not values.get("deepspeed"):
        return None
    size = given_json.train_batch_size(read_deepspeed(values["deepspeed"]))
    place = _place("deepspeed", values, origins)
    return None if size is None else (size, f"{place}: train_batch_size")


def overlay(settings: EngineSettings, values: Mapping[str, Any]) -> EngineSettings:
    """`settings` with the keys of a given DeepSpeed JSON that TrainingArguments has no word for."""
    if not values.get("deepspeed") or not isinstance(settings, DeepSpeedSettings):
        return settings
    given = read_deepspeed(values["deepspeed"])
    return replace(settings, json=given_json.overlay(settings.json, given))


def unresolved(settings: EngineSettings, values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(field, what is wrong and the fix) for "auto"s that nothing here gives a value for."""
    if values.get("deepspeed") and isinstance(settings, DeepSpeedSettings):
        given = read_deepspeed(values["deepspeed"])
        for key in given_json.unresolved(given, settings.json):
            yield "deepspeed", f'{key} is "auto" there, and bigtrain has no value for it; say one'


def faults(
    values: Mapping[str, Any],
    *,
    engine: EngineName,
    topology: Topology,
    options: EngineOptions,
    origins: Mapping[str, str],
) -> Iterator[tuple[str, str]]:
    """(field, what is wrong and the fix) for foreign configs that can't be followed.

    `values` are whole, `options` as they were said here; `origins` tell where both stand, which a
    config may contradict.
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
    yield from given_fsdp.faults(values, engine=engine, topology=topology)
    yield from _recomputation_faults(values, origins)
    if values.get("deepspeed"):
        given = read_deepspeed(values["deepspeed"])
        whole = merge(options, values)
        for why in given_json.faults(given, values, whole, origins=origins):
            yield "deepspeed", why
    yield from conflicts(options, given_options(values), origins=origins)
    yield from _accelerator_faults(values.get("accelerator_config"), engine=engine)


def _recomputation_faults(
    values: Mapping[str, Any], origins: Mapping[str, str]
) -> Iterator[tuple[str, str]]:
    for name in _RECOMPUTATION if given_fsdp.recomputes(values) else ():
        place = origins.get(f"training.{name}")
        if place is not None and values[name] is False:
            yield (
                "fsdp_config",
                f"{given_fsdp.RECOMPUTATION} is true there, but training.{name} is false "
                f"({place}); neither wins: leave one out",
            )


def batch_faults(said: Mapping[str, Any], topology: Topology) -> Iterator[tuple[str, str]]:
    """(field, what is wrong and the fix) where a given global batch is not what was said. What a
    script has not said yet is compared by whoever makes its arguments."""
    micro = said.get("per_device_train_batch_size")
    steps = said.get("gradient_accumulation_steps")
    given = global_batch(said, {})
    if given is None or micro is None or steps is None:
        return
    size = micro * steps * topology.world_size
    if size != given[0]:
        yield (
            "deepspeed",
            f"train_batch_size is {given[0]} there, but {micro} (per_device_train_batch_size) × "
            f"{steps} (gradient_accumulation_steps) × {topology.world_size} processes are {size}; "
            'neither wins: make them equal, or say "auto" there',
        )


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
    for key in config if isinstance(config, Mapping) else ():
        known = accelerator_keys()
        if key not in known:
            yield "accelerator_config", f"{key} is no key of it{did_you_mean(key, known)}"
    for key, engines in _ACCELERATOR_UNREAD.items():
        if engine not in engines:
            continue
        is_mapping = isinstance(config, Mapping)
        value = config.get(key) if is_mapping else getattr(config, key, None)
        if value:
            yield "accelerator_config", f"{key}: {value!r} is not supported; leave it out"
