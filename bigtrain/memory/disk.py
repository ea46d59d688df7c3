"""What a checkpoint takes on disk, and how many are kept."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from bigtrain.checkpoint.staging import kept_at_most
from bigtrain.memory.estimate import Request
from bigtrain.memory.shapes import BYTES

_SMALL_FILES = 2 << 20
"""Tokenizer, config, state, manifest: not counted one by one."""


@dataclass(frozen=True, kw_only=True)
class DiskPlan:
    """Bytes that the run will write and keep, all ranks together."""

    checkpoint: int
    kept: int | None
    """Checkpoints that are there at once; one more while a new one is written. None: all that the
    run writes, and how many that is depends on the data."""
    model: int
    """The exported model, at the end and (with `export: every`) in each checkpoint."""

    @property
    def peak(self) -> int | None:
        return None if self.kept is None else self.checkpoint * (self.kept + 1) + self.model


def disk_plan(request: Request, *, checkpoints: int | None) -> DiskPlan:
    """`checkpoints`: how many the run will write, where that is known; None: not known."""
    training = request.training
    shapes, place = request.shapes, request.placement()
    # Of an adapted model, its adapters alone are exported.
    exported = [p for p in shapes.parameters if ".lora_" in p.name] or shapes.parameters
    model = sum(parameter.bytes_loaded for parameter in exported)
    frozen = sum(p.bytes_loaded for p in shapes.parameters if not p.trained)
    masters = shapes.trained_numel * place.master_bytes + frozen
    width = place.optimizer.bytes_per_element or BYTES[request.config.master_dtype]
    moments = int(place.optimizer.moments * shapes.trained_numel * width)
    only_model = bool(training.get("save_only_model"))
    kept = _kept(training, checkpoints)
    models = {"never": 0, "every": (kept or 0) + 1}.get(str(training.get("export")), 1)
    return DiskPlan(
        checkpoint=masters + (0 if only_model else moments) + _SMALL_FILES,
        kept=kept,
        model=models * (model + _SMALL_FILES),
    )


def _kept(training: Mapping[str, Any], checkpoints: int | None) -> int | None:
    watches = training.get("load_best_model_at_end") or training.get("metric_for_best_model")
    kept = kept_at_most(training.get("save_total_limit"), protected=2 if watches else 1)
    if kept is None or checkpoints is None:
        return checkpoints if kept is None else kept
    return min(checkpoints, kept)
