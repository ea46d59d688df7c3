"""What is left of a run that has ended: the checkpoint that the next start goes on from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bigtrain.checkpoint.staging import newest_first
from bigtrain.plan import RunPlan


def summary(plan: RunPlan, *, exit_code: int, saved: str | None) -> dict[str, Any]:
    """How the run ended, and where what it left is, for programs."""
    return {
        "exit_code": exit_code,
        "output_dir": plan.output_dir,
        "checkpoint": _checkpoint(plan, saved),
    }


def how_to_go_on(plan: RunPlan, *, saved: str | None) -> str:
    """For a person who has stopped the run. `saved`: the last checkpoint that it has told of."""
    checkpoint = _checkpoint(plan, saved)
    if checkpoint is None:
        return "no checkpoint was saved"
    if _finds_it_by_itself(plan):
        return f"the same command goes on from {checkpoint}"
    return f"go on from {checkpoint} with --resume auto"


def _checkpoint(plan: RunPlan, saved: str | None) -> str | None:
    """The run's own last one. What lies in `output_dir` may be another run's, unless the next
    start would go on from it."""
    if saved is not None or not _finds_it_by_itself(plan):
        return saved
    directory = Path(plan.output_dir)
    newest = next(iter(newest_first(directory)), None) if directory.is_dir() else None
    return None if newest is None else str(newest)


def _finds_it_by_itself(plan: RunPlan) -> bool:
    return plan.kind == "run_file" and plan.resume == "auto"
