"""What is left of a run that has ended: the checkpoint that the next start goes on from."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Any

from bigtrain.checkpoint.manifest import read_manifest
from bigtrain.checkpoint.staging import committed_at, newest_first
from bigtrain.errors import CheckpointError
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
    found = newest_first(directory) if directory.is_dir() else []
    newest = next((path for path in found if _is_since(path, plan.begun_anew)), None)
    return None if newest is None else str(newest)


def _is_since(checkpoint: Path, begun_anew: str) -> bool:
    """Whether it may be the run's own: the same that the trainer finds."""
    if not begun_anew:
        return True
    try:
        return committed_at(checkpoint, read_manifest(checkpoint)) >= datetime.fromisoformat(
            begun_anew
        )
    except (CheckpointError, OSError):
        return False


def _finds_it_by_itself(plan: RunPlan) -> bool:
    return plan.kind == "run_file" and plan.resume == "auto"
