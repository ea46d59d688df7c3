"""A DeepSpeed JSON that somebody else wrote: read, checked, and laid over ours.

Its `"auto"`s become our values. What TrainingArguments say as well must agree with them. A key that
the installed DeepSpeed does not have is refused: DeepSpeed itself would take it without a word.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from typing import Any, TypeAlias

from bigtrain.errors import ConfigError
from bigtrain.paths import expand_home
from bigtrain.small_files import read_small_text
from bigtrain.translate import deepspeed_keys, given_json_options
from bigtrain.translate.config import EngineName, EngineOptions
from bigtrain.translate.deepspeed_sources import AUTO
from bigtrain.translate.given import shown
from bigtrain.translate.given_json_fates import ARGUMENTS
from bigtrain.translate.given_json_options import leaf

Json: TypeAlias = Mapping[str, Any]
_ZERO_ENGINES: Mapping[int, EngineName] = {1: "zero1", 2: "zero2", 3: "zero3"}
BETAS = "optimizer.params.betas"
"""Where the JSON has two TrainingArguments fields in one."""
_AUTO_BY_DEFAULT = ("keep_in_fp32_modules",)
"""Keys that DeepSpeed itself takes "auto" for: left out, they are that."""
_SCHEDULES = {
    "WarmupLR": ("constant_with_warmup",),
    "WarmupDecayLR": ("linear",),
    "WarmupCosineLR": ("cosine",),
}
_OPTIMIZERS = ("adamw", "adam")
_ADAMW = ("adamw_torch", "adamw_torch_fused", "adamw_torch_xla", "adamw_torch_npu_fused")
_OPTIMIZER_PARAMETERS = (
    *(key for key in ARGUMENTS if key.startswith("optimizer.")),
    *(BETAS, "optimizer.params.torch_adam", "optimizer.params.adam_w_mode"),
)


def read(given: Any, field: str) -> dict[str, Any]:
    """A mapping, JSON text, or the path of a JSON file. ConfigError names `field`."""
    if isinstance(given, Mapping):
        return dict(given)
    text = given if str(given).lstrip().startswith("{") else _read_text(str(given), field)
    try:
        value = json.loads(text, object_pairs_hook=lambda pairs: _object(pairs, field))
    except ConfigError:
        raise
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"training.{field}: {given!s:.200} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ConfigError(f"training.{field}: {given} holds no JSON object")
    return value


def _object(pairs: list[tuple[str, Any]], field: str) -> dict[str, Any]:
    """A JSON object, which may not say a key twice."""
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = ", ".join(sorted({key for key in keys if keys.count(key) > 1}))
        raise ConfigError(f"training.{field}: {twice}: said twice there; keep one")
    return found


def engine(given: Json) -> EngineName:
    """The engine that its ZeRO stage stands for."""
    return _ZERO_ENGINES.get(leaf(given, "zero_optimization.stage") or 0, "ddp")


def implied(given: Json) -> Iterator[tuple[str, str, Any]]:
    """(TrainingArguments field, key, value) for what the JSON says in whole values."""
    for key, field in ARGUMENTS.items():
        value = leaf(given, key)
        if value not in (None, AUTO):
            yield field, key, value
    betas = leaf(given, BETAS)
    if isinstance(betas, list) and len(betas) == 2:
        yield "adam_beta1", BETAS, betas[0]
        yield "adam_beta2", BETAS, betas[1]


def train_batch_size(given: Json) -> int | None:
    """The global batch, where it is said in a number."""
    size = given.get("train_batch_size")
    return None if size in (None, AUTO) else int(size)


def faults(
    given: Json,
    values: Mapping[str, Any],
    options: EngineOptions,
    *,
    origins: Mapping[str, str],
) -> Iterator[str]:
    """What is wrong with it, and the fix, for each fault. `origins`: where our own words stand."""
    yield from deepspeed_keys.unknown(given)
    yield from given_json_options.faults(given, values, options)
    yield from _optimizer_faults(given, values, origins)
    yield from _schedule_faults(given, values)
    for field, key, value in implied(given):
        if not _same(value, values[field]):
            yield (
                f"{key} is {shown(value)} there, but training.{field} is {shown(values[field])} "
                f"({origins.get(f'training.{field}', 'its default')}); neither wins: make them "
                'equal, leave one out, or say "auto" there'
            )
    if engine(given) == "ddp":
        yield "its ZeRO stage is 0, which is plain data parallelism; leave it out: engine ddp"


def overlay(ours: Json, given: Json) -> dict[str, Any]:
    """`given` over `ours`; what is "auto" there, or null, stays ours, and so does what the loop and
    the topology decide."""
    merged = dict(ours)
    for key, value in given.items():
        if value in (None, AUTO) or _is_ours(key, ours):
            continue
        inner = ours.get(key)
        if isinstance(value, Mapping):
            merged[key] = overlay(inner if isinstance(inner, Mapping) else {}, value)
        elif isinstance(value, float) and type(inner) is int and value.is_integer():
            merged[key] = int(value)  # a bucket of 5e8
        else:
            merged[key] = value
    return merged


def unresolved(given: Json, ours: Json, prefix: str = "") -> Iterator[str]:
    """Keys that are "auto" there and for which we have no value."""
    for key, value in given.items():
        if _is_ours(key, ours):
            continue
        inner = ours.get(key)
        if isinstance(value, Mapping):
            yield from unresolved(
                value, inner if isinstance(inner, Mapping) else {}, f"{prefix}{key}."
            )
        elif value == AUTO and key not in (*ours, *_AUTO_BY_DEFAULT):
            yield f"{prefix}{key}"


def _is_ours(key: str, ours: Json) -> bool:
    """Whether the loop and the topology decide it, or it is of a part that isn't offloaded."""
    if key in ("offload_optimizer", "offload_param"):
        return key not in ours
    return key in ("train_batch_size", "optimizer", "scheduler", "sequence_parallel_size")


def _same(there: Any, here: Any) -> bool:
    if isinstance(there, (int, float)) and isinstance(here, (int, float)):
        return math.isclose(float(there), float(here), rel_tol=1e-9)
    return bool(there == here)


def _optimizer_faults(
    given: Json, values: Mapping[str, Any], origins: Mapping[str, str]
) -> Iterator[str]:
    section = given.get("optimizer")
    if not isinstance(section, Mapping):
        return
    kind, ours = section.get("type"), values["optim"]
    if str(kind).lower() not in _OPTIMIZERS:
        yield (
            f"optimizer.type is {kind!r}, but the loop makes the optimizer; leave it out and set "
            "training.optim and its hyperparameters"
        )
    elif ours not in _ADAMW:
        yield (
            f"optimizer.type is {kind} there, but training.optim is {ours} "
            f"({origins.get('training.optim', 'its default')}); neither wins: make it adamw_torch, "
            "or leave one out"
        )
    if leaf(section, "params.adam_w_mode") not in (None, AUTO, True):
        yield (
            "optimizer.params.adam_w_mode is false there, but the loop makes AdamW, whose weight "
            "decay is apart from the gradient; leave it out"
        )
    for key in section.get("params") or {}:
        if f"optimizer.params.{key}" not in _OPTIMIZER_PARAMETERS:
            yield f"optimizer.params.{key} has no counterpart in TrainingArguments; leave it out"


def _schedule_faults(given: Json, values: Mapping[str, Any]) -> Iterator[str]:
    section = given.get("scheduler")
    if not isinstance(section, Mapping):
        return
    ours = _SCHEDULES.get(str(section.get("type")), ())
    said = values["lr_scheduler_type"]
    if said not in ours:
        wanted = f" as {' or '.join(ours)}" if ours else ""
        yield (
            f"scheduler.type is {section.get('type')!r}, but training.lr_scheduler_type is {said}; "
            f"the loop makes the schedule: leave scheduler out, or set lr_scheduler_type{wanted}"
        )
    whole = [key for key, value in (section.get("params") or {}).items() if value != AUTO]
    if whole:
        yield (
            f"scheduler.params ({', '.join(whole)}) belong to the loop; say them by "
            "training.warmup_steps and learning_rate"
        )


def _read_text(given: str, field: str) -> str:
    path = expand_home(given, label=f"training.{field}")
    return read_small_text(path, label=f"training.{field}: {path!s:.200}")
