"""What each optimizer keeps for a parameter: how many moments, and how wide."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class OptimizerShape:
    """State that an optimizer keeps beside a parameter."""

    moments: float
    """Tensors of the parameter's shape."""
    bytes_per_element: float | None = None
    """Of a moment; None: the width of the parameter as it is trained."""
    step_bytes: int = 4
    """A counter for each parameter, or for each flat group of them."""
    is_known: bool = True


_ADAM = OptimizerShape(moments=2)
_SHAPES: Mapping[str, OptimizerShape] = {
    "adamw_torch": _ADAM,
    "adamw_torch_fused": _ADAM,
    "adamw_apex_fused": _ADAM,
    "sgd": OptimizerShape(moments=0, step_bytes=0),
    "adagrad": OptimizerShape(moments=1),
    "rmsprop": OptimizerShape(moments=1),
    "adamw_8bit": OptimizerShape(moments=2, bytes_per_element=1 + 4 / 256),
    "adamw_bnb_8bit": OptimizerShape(moments=2, bytes_per_element=1 + 4 / 256),
    "paged_adamw_8bit": OptimizerShape(moments=2, bytes_per_element=1 + 4 / 256),
    "paged_adamw_32bit": _ADAM,
    "lion_32bit": OptimizerShape(moments=1),
    "lion_8bit": OptimizerShape(moments=1, bytes_per_element=1 + 4 / 256),
    "paged_lion_32bit": OptimizerShape(moments=1),
    "paged_lion_8bit": OptimizerShape(moments=1, bytes_per_element=1 + 4 / 256),
    # Its factors are a row and a column of each matrix: nothing beside the others' moments.
    "adafactor": OptimizerShape(moments=0),
}


def optimizer_name(training: Mapping[str, Any]) -> str:
    """The optimizer that TrainingArguments name, or have by default."""
    return str(training.get("optim") or "adamw_torch_fused")


def optimizer_shape(name: str) -> OptimizerShape:
    """The state of the optimizer that `training.optim` names; Adam's where it is not known."""
    return _SHAPES.get(name, OptimizerShape(moments=2, is_known=False))
