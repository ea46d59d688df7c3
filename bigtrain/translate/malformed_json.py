"""What of a DeepSpeed JSON can't be read at all: values of another type, and secrets.

The rest is read without them, so that all that is wrong can be told at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from bigtrain.arguments.schema import load_schema
from bigtrain.arguments.values import read_value
from bigtrain.errors import ConfigError
from bigtrain.secrecy import SECRET_ADVICE, looks_secret
from bigtrain.translate import deepspeed_keys, given_json
from bigtrain.translate.deepspeed_sources import AUTO
from bigtrain.translate.given_json import Json
from bigtrain.translate.given_json_options import leaf

_SECTIONS = frozenset(
    {
        *("zero_optimization", "bf16", "fp16", "optimizer", "scheduler", "data_types"),
        *("activation_checkpointing", "aio", "flops_profiler", "comms_logger", "timers"),
        *("tensorboard", "wandb", "comet", "csv_monitor", "checkpoint", "compile"),
        *("torch_autocast", "data_efficiency", "hybrid_engine", "autotuning"),
    }
)
_INNER_SECTIONS = (
    *("optimizer.params", "scheduler.params", "timers.throughput"),
    *("zero_optimization.offload_optimizer", "zero_optimization.offload_param"),
    *("data_efficiency.data_sampling", "data_efficiency.data_routing"),
)
_STAGE = "zero_optimization.stage"


def read_deepspeed(given: Any) -> dict[str, Any]:
    """DeepSpeed's, as `given_json.read`. ConfigError also lists what can't be read of it."""
    value = given_json.read(given, "deepspeed")
    found = [_told(why) for _, why in _malformed(value)]
    if found:
        raise ConfigError(found)
    return value


def read_what_is_sound(given: Any) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    """What can be read of it, and (key, what is wrong) for the rest.

    ConfigError where nothing can: it is no JSON, or its stage is none, so that the engine is not
    known.
    """
    value = given_json.read(given, "deepspeed")
    found = [(key, _told(why)) for key, why in _malformed(value)]
    if any(key in (_STAGE, "zero_optimization") for key, _ in found):
        raise ConfigError([why for _, why in found])
    for key, _ in found:
        value = _without(value, key.split("."))
    return value, found


def _told(why: str) -> str:
    return f"training.deepspeed: {why}"


def _without(section: Json, path: list[str]) -> dict[str, Any]:
    first, rest = path[0], path[1:]
    inner = section.get(first)
    kept = {key: value for key, value in section.items() if key != first}
    if not rest or not isinstance(inner, Mapping):
        return kept
    return {**kept, first: _without(inner, rest)}


def _malformed(given: Json) -> Iterator[tuple[str, str]]:
    """(key, what is wrong and the fix): sections that are none, a stage that is no number, and
    secrets, which are never shown."""
    for key in sorted(_SECTIONS & given.keys()):
        if given[key] is not None and not isinstance(given[key], Mapping):
            what = f"{key} is {given[key]!r} there"
            yield key, f'{what}; make it a section, as in {{"enabled": true}}'
    for key in _INNER_SECTIONS:
        value = leaf(given, key)
        if value is not None and not isinstance(value, Mapping):
            yield key, f"{key} is {value!r} there, not a section"
    stage = leaf(given, _STAGE)
    if isinstance(stage, bool) or stage not in (None, 0, 1, 2, 3):
        yield _STAGE, f"{_STAGE} is {stage!r} there, not 0, 1, 2 or 3"
    yield from _mistyped(given)
    for key, content in given.items():
        if isinstance(content, Mapping):
            texts = (name for name, value in content.items() if value and isinstance(value, str))
            names = (name for name in texts if looks_secret(name))
            yield from ((f"{key}.{name}", f"{key}.{name}: {SECRET_ADVICE}") for name in names)


def _mistyped(given: Json) -> Iterator[tuple[str, str]]:
    """What DeepSpeed could not hold, and what TrainingArguments could not."""
    schema = load_schema()
    told = dict(deepspeed_keys.mistyped(given))
    yield from told.items()
    size = given.get("train_batch_size")
    if "train_batch_size" not in told and isinstance(size, (int, float)) and size < 1:
        yield "train_batch_size", f"train_batch_size is {size} there; it must be at least 1"
    betas = leaf(given, given_json.BETAS)
    if betas not in (None, AUTO) and not (isinstance(betas, list) and len(betas) == 2):
        yield given_json.BETAS, f"{given_json.BETAS} is {betas!r} there, not two numbers"
    for field, key, value in given_json.implied(given):
        if key in told:
            continue
        if isinstance(value, str):  # an argument would be read from text
            yield key, f"{key} is {value!r} there, not a number"
            continue
        try:
            read_value(schema[field], value)
        except ValueError as error:
            yield key, f"{key}: {error}"
