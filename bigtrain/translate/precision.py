"""Which precision a run computes, keeps and reduces in: the same rules for every engine."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from bigtrain.translate.config import DTypeName

_FP16_LEVELS: Mapping[str, DTypeName] = {"O0": "fp32", "O1": "fp16"}


def compute_dtype(values: Mapping[str, Any]) -> DTypeName:
    """The precision of forward and backward that `bf16`, `fp16` and `fp16_opt_level` ask for."""
    if values["bf16"]:
        return "bf16"
    if values["fp16"]:
        return _FP16_LEVELS.get(values["fp16_opt_level"], "fp16")
    return "fp32"


def faults(
    values: Mapping[str, Any], *, on_deepspeed: bool, on_cpu: bool, bf16_masters: bool
) -> Iterator[tuple[str, str]]:
    """(field, what is wrong and the fix) for precisions that can't be had."""
    if values["bf16"] and values["fp16"]:
        yield "fp16", "bf16 and fp16 are both true; keep one of them"
        return
    if values["fp16"] and values["fp16_opt_level"] not in _FP16_LEVELS:
        yield (
            "fp16_opt_level",
            f"{values['fp16_opt_level']} is not supported yet; use O1 (autocast) or O0 (fp32)",
        )
    if compute_dtype(values) == "fp16" and on_deepspeed and on_cpu:
        yield (
            "fp16",
            "DeepSpeed has no fp16 on a CPU; use bf16: true, or engine ddp or fsdp, or a GPU",
        )
    if bf16_masters and not values["bf16"]:
        yield "bf16", "engine.master_dtype bf16 needs training.bf16: true; set it, or master fp32"
