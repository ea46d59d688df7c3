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


def _weights_dtype(request: Request) -> str:
    """What the model's own weights are in as they compute: where each use casts them the masters'
    fp32, but those that are frozen stay as they were loaded."""
    batch = request.batch()
    if not (batch.is_autocast or batch.copies_weights):
        return request.config.compute_dtype
    frozen = [p.dtype for p in request.shapes.parameters if not p.trained]
    return (
        max(set(frozen), key=frozen.count)
        if 2 * len(frozen) > len(request.shapes.parameters)
        else "fp32"
    )


def _read(answer: Mapping[str, Any]) -> TracedActivations:
    return TracedActivations(
        head=int(answer["head"]),
        layers=tuple(map(int, answer["layers"])),
        fixed=int(answer["fixed"]),
    )


def traced_estimate(request: Request, model: Mapping[str, Any], *, asker: Asker) -> MemoryPlan:
    """As `estimate`, with the activations of the real model. It takes seconds.

    `model` says what to build: `config`, or `name` and `revision`; `attn_implementation`, `lora`.
    """
    batch = request.batch()
    activations = asker.ask(
        {
            "kind": "trace",
            **model,
            "compute_dtype": request.config.compute_dtype,
            "weights_dtype": _weights_dtype(request),
            "autocast": batch.is_autocast,
            "cast_weights": batch.copies_weights and not batch.is_autocast,
            "recompute": request.recompute,
            "sequences": batch.sequences,
            "sequence_length": batch.sequence_length,
        },
        read=_read,
    )
    return plan_with(request, activations, method="trace")
