"""Activations of the real model, run on fake tensors in a process of its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from bigtrain.memory.estimate import MemoryPlan, Request, plan_with
from bigtrain.memory.questions import Asker


@dataclass(frozen=True, kw_only=True)
class TracedActivations:
    """Peaks that the real model showed, in place of the formula's."""

    head: int
    layers: tuple[int, ...]
    fixed: int

    def in_layer(self, remaining: int) -> int:
        return self.layers[min(remaining, len(self.layers) - 1)]


def traced_estimate(request: Request, model: Mapping[str, Any], *, asker: Asker) -> MemoryPlan:
    """As `estimate`, with the activations of the real model. It takes seconds.

    `model` says what to build: `config`, or `name` and `revision`; `attn_implementation`, `lora`.
    """
    batch = request.batch()
    answer = asker.ask(
        {
            "kind": "trace",
            **model,
            "compute_dtype": request.config.compute_dtype,
            "weights_dtype": "fp32" if batch.is_autocast else request.config.compute_dtype,
            "autocast": batch.is_autocast,
            "recompute": request.recompute,
            "sequences": batch.sequences,
            "sequence_length": batch.sequence_length,
        }
    )
    activations = TracedActivations(
        head=answer["head"], layers=tuple(answer["layers"]), fixed=answer["fixed"]
    )
    return plan_with(request, activations, method="trace")
