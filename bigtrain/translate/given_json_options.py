"""A DeepSpeed JSON's keys: those that are engine options here, and values that can't be had."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from bigtrain.translate import deepspeed_keys
from bigtrain.translate.config import EngineOptions
from bigtrain.translate.given import GivenOption, shown
from bigtrain.translate.given_json_fates import (
    DTYPES,
    ONLY,
    OPTIONS,
    WITHOUT_EFFECT,
    is_judged,
    itself,
)

_ZERO = "zero_optimization"


def options(given: Mapping[str, Any]) -> list[GivenOption]:
    """What it says of the engine."""
    found = []
    for key, (option, read) in OPTIONS.items():
        spelled = leaf(given, key)
        if spelled is None or spelled == "auto" or (read is itself and not _is_used(given, key)):
            continue
        known = not isinstance(read, Mapping) or spelled in read
        if known:
            value = read[spelled] if isinstance(read, Mapping) else read(spelled)
            found.append(
                GivenOption(option=option, value=value, field="deepspeed", key=key, spelled=spelled)
            )
    return found


def _is_used(given: Mapping[str, Any], key: str) -> bool:
    """A path is nobody's where the section's device is another than NVMe."""
    section, _, name = key.rpartition(".")
    return name != "nvme_path" or leaf(given, f"{section}.device") == "nvme"


def faults(
    given: Mapping[str, Any], values: Mapping[str, Any], options: EngineOptions
) -> Iterator[str]:
    """What is wrong, and the fix, for values that can't be had. `options`: all that was said."""
    for key, (_, read) in OPTIONS.items():
        spelled = leaf(given, key)
        if isinstance(read, Mapping) and spelled not in (None, "auto", *read):
            yield f"{key} is {spelled!r} there, not {_listed(read)}"
    for key, (only, why) in ONLY.items():
        spelled = leaf(given, key)
        plain = spelled.lower() if isinstance(spelled, str) else spelled
        if plain not in (None, "auto", *only):
            yield f"{key} is {_word(spelled)} there, but {why}"
    for key in deepspeed_keys.said(given):
        if not is_judged(key):
            yield f"{key}: the installed DeepSpeed has it, and bigtrain not yet; leave it out"
    yield from _stage_faults(given, values, options)
    yield from _precision_faults(given, options)


def _stage_faults(
    given: Mapping[str, Any], values: Mapping[str, Any], options: EngineOptions
) -> Iterator[str]:
    """What the optimizers of ZeRO's stages assert when the job runs (deepspeed/runtime/engine.py,
    zero/stage_1_and_2.py and zero/stage3.py)."""
    stage = leaf(given, f"{_ZERO}.stage") or 0
    yield from _partial_offload_faults(given, stage)
    yield from _norm_faults(given, values, options, stage)
    scatters = leaf(given, f"{_ZERO}.reduce_scatter") is not False
    if scatters and stage >= 2:
        whole = f"set {_ZERO}.reduce_scatter: false"
        for key, usual in (("prescale_gradients", False), ("gradient_predivide_factor", 1)):
            if given.get(key) not in (None, "auto", usual):
                yield (
                    f"{key} is {_word(given[key])} there, but stage {stage} scatters gradients; "
                    f"leave it out, or {whole}"
                )
    if not scatters and stage == 3 and options.quantized_gradients:
        yield f"{_ZERO}.reduce_scatter is false there, but gradients are quantized; leave one out"
    bucket = leaf(given, f"{_ZERO}.allgather_bucket_size")
    if isinstance(bucket, (int, float)) and stage in (1, 2) and bucket % 2:
        yield f"{_ZERO}.allgather_bucket_size is {bucket} there; it must be even"


def _norm_faults(
    given: Mapping[str, Any], values: Mapping[str, Any], options: EngineOptions, stage: int
) -> Iterator[str]:
    if leaf(given, f"{_ZERO}.compute_grad_norm") is not False:
        return
    clips, in_bf16 = values["max_grad_norm"], values["bf16"] and options.master_dtype != "bf16"
    needs_it = {
        f"training.max_grad_norm {clips} clips by it": clips,
        f"stage {stage} needs it": stage == 3,
        "an offloaded optimizer needs it": options.offload_optimizer,
        "stage 1 needs it in bf16": stage == 1 and in_bf16,
    }
    for why in (why for why, holds in needs_it.items() if holds):
        yield f"{_ZERO}.compute_grad_norm is false there, but {why}; leave one out"


def _partial_offload_faults(given: Mapping[str, Any], stage: int) -> Iterator[str]:
    section = f"{_ZERO}.offload_optimizer"
    ratio = leaf(given, f"{section}.ratio")
    is_offloaded = leaf(given, f"{section}.device") not in (None, "none")
    if is_offloaded and ratio not in (None, "auto") and ratio < 1 and stage != 3:
        yield (
            f"{section}.ratio is {ratio} there, but only stage 3 can offload a part, and the stage "
            f"is {stage}; make it 1.0, or the stage 3"
        )


def without_effect(given: Mapping[str, Any]) -> Iterator[str]:
    """Each key from which nothing comes here, with the reason."""
    for key, why in WITHOUT_EFFECT.items():
        if leaf(given, key) is not None:
            yield f"{key} ({why})"


def _precision_faults(given: Mapping[str, Any], options: EngineOptions) -> Iterator[str]:
    """Gradients accumulate, and the optimizer keeps its state, in the masters' precision."""
    masters = options.master_dtype or "fp32"
    spelled = leaf(given, "data_types.grad_accum_dtype")
    kept = DTYPES.get(spelled) if isinstance(spelled, str) else None
    if kept not in (None, masters):
        yield (
            f"data_types.grad_accum_dtype is {spelled} there, but gradients accumulate in the "
            f"masters' precision, {masters}; leave it out, or set engine.master_dtype"
        )
    states = leaf(given, "bf16.bf16_optimizer_states")
    if isinstance(states, bool) and states != (masters == "bf16"):
        yield (
            f"bf16.bf16_optimizer_states is {_word(states)} there, but the optimizer's state is in "
            f"the masters' precision, {masters}; leave it out, or set engine.master_dtype"
        )


def leaf(config: Any, key: str) -> Any:
    """The value at a dotted key; None where there is none."""
    for part in key.split("."):
        config = config.get(part) if isinstance(config, Mapping) else None
    return config


def _listed(values: Mapping[Any, Any]) -> str:
    words = [_word(value) for value in values]
    return f"{', '.join(words[:-1])} or {words[-1]}"


def _word(value: Any) -> str:
    """As JSON has it; of a section, that it is there."""
    return "set" if isinstance(value, (Mapping, list)) else shown(value)
