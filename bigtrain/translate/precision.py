"""Which precision a run computes, keeps and reduces in: the same rules for every engine."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from bigtrain.translate.config import DTypeName

_FP16_LEVELS: Mapping[str, DTypeName] = {"O0": "fp32", "O1": "fp16", "O2": "fp16"}
_UNSUPPORTED_LEVELS = {
    "O2": "fp16 weights with fp32 masters are what engines fsdp and zero compute with; use one of "
    "them, or O1 (autocast)",
    "O3": "without fp32 masters small updates vanish, and no engine trains so; use O1 (autocast), "
    "or O2 on engine fsdp or zero",
}


def compute_dtype(values: Mapping[str, Any]) -> DTypeName:
    """The precision of forward and backward that `bf16`, `fp16` and `fp16_opt_level` ask for."""
    if values["bf16"]:
        return "bf16"
    if values["fp16"]:
        return _FP16_LEVELS.get(values["fp16_opt_level"], "fp16")
    return "fp32"


def faults(
    values: Mapping[str, Any],
    *,
    on_deepspeed: bool,
    on_cpu: bool,
    is_sharded: bool,
    bf16_masters: bool,
) -> Iterator[tuple[str, str]]:
    """(field, what is wrong and the fix) for precisions that can't be had."""
    if values["bf16"] and values["fp16"]:
        yield "fp16", "bf16 and fp16 are both true; keep one of them"
        return
    level = values["fp16_opt_level"]
    if values["fp16"] and level in _UNSUPPORTED_LEVELS and not (level == "O2" and is_sharded):
        yield "fp16_opt_level", f"{level} is not supported here: {_UNSUPPORTED_LEVELS[level]}"
    if compute_dtype(values) == "fp16" and on_deepspeed and on_cpu:
        yield (
            "fp16",
            "DeepSpeed has no fp16 on a CPU; use bf16: true, or engine ddp or fsdp, or a GPU",
        )
    if bf16_masters and not values["bf16"]:
        yield "bf16", "engine.master_dtype bf16 needs training.bf16: true; set it, or master fp32"
