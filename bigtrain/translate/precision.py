"""Which precision a run computes, keeps and reduces in: the same rules for every engine."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal

from bigtrain.translate.config import DTypeName

_FP16_LEVELS: Mapping[str, DTypeName] = {
    "O0": "fp32",
    "O1": "fp16",
    "O2": "fp16",
    "O3": "fp16",
}


def compute_dtype(values: Mapping[str, Any]) -> DTypeName:
    """The precision of forward and backward that `bf16`, `fp16` and `fp16_opt_level` ask for."""
    if values["bf16"]:
        return "bf16"
    if values["fp16"]:
        return _FP16_LEVELS[values["fp16_opt_level"]]
    return "fp32"


def master_dtype(values: Mapping[str, Any], said: Literal["fp32", "bf16"] | None) -> DTypeName:
    """The precision that trained parameters are kept in: fp16 level O3 has no other copy."""
    return "fp16" if _level(values) == "O3" else said or "fp32"


def casts_weights(values: Mapping[str, Any]) -> bool:
    """Whether weights are fp16 as a whole (O2 and O3), and not what autocast makes of them."""
    return _level(values) in ("O2", "O3")


def _level(values: Mapping[str, Any]) -> str:
    return values["fp16_opt_level"] if values["fp16"] else "O0"


def faults(
    values: Mapping[str, Any],
    *,
    on_deepspeed: bool,
    on_cpu: bool,
    masters: Literal["fp32", "bf16"] | None,
) -> Iterator[tuple[str, str]]:
    """(field, what is wrong and the fix) for precisions that can't be had."""
    if values["bf16"] and values["fp16"]:
        yield "fp16", "bf16 and fp16 are both true; keep one of them"
        return
    if _level(values) == "O3":
        yield from _faults_of_o3(on_deepspeed=on_deepspeed, masters=masters)
    if compute_dtype(values) == "fp16" and on_deepspeed and on_cpu:
        yield (
            "fp16",
            "DeepSpeed has no fp16 on a CPU; use bf16: true, or engine ddp or fsdp, or a GPU",
        )
    if masters == "bf16" and not values["bf16"]:
        yield "bf16", "engine.master_dtype bf16 needs training.bf16: true; set it, or master fp32"


def _faults_of_o3(
    *, on_deepspeed: bool, masters: Literal["fp32", "bf16"] | None
) -> Iterator[tuple[str, str]]:
    if on_deepspeed:
        yield (
            "fp16_opt_level",
            "O3 is not supported here: DeepSpeed keeps fp32 masters of fp16 weights, which is O2; "
            "use that, or engine single, ddp or fsdp",
        )
    if masters is not None:
        yield (
            "fp16_opt_level",
            f"O3 keeps fp16 weights alone, engine.master_dtype says {masters}; leave one of the "
            "two out, or use O2",
        )
