"""What is left of a run that has ended: the checkpoint that the next start goes on from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bigtrain.checkpoint.staging import newest_first
from bigtrain.plan import RunPlan


def newest_checkpoint(plan: RunPlan) -> Path | None:
    """The one that was committed last, whoever committed it; None where there is none."""
    directory = Path(plan.output_dir)
    return next(iter(newest_first(directory)), None) if directory.is_dir() else None


def summary(plan: RunPlan, *, exit_code: int) -> dict[str, Any]:
    """How the run ended, and where what it left is, for programs."""
    checkpoint = newest_checkpoint(plan)
    return {
        "exit_code": exit_code,
        "output_dir": plan.output_dir,
        "checkpoint": None if checkpoint is None else str(checkpoint),
    }


def how_to_go_on(plan: RunPlan, *, saved: str | None) -> str:
    """For a person who has stopped the run. `saved`: the last checkpoint that it has told of."""
    same = plan.kind == "run_file" and plan.resume == "auto"
    if saved is not None and not same:
        return f"go on from {saved} with --resume auto"
    checkpoint = saved or (newest_checkpoint(plan) if same else None)
    if checkpoint is None:
        return "no checkpoint was saved"
    return f"the same command goes on from {checkpoint}"
