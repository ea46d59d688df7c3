"""Whether a job that starts anew still gets anywhere, so that it does not do so for ever.

A node can vanish because of the run itself: a program that takes a machine's memory takes the agent
with it, at the same step of every start; and a notice ahead of a short time limit can come before
the first step. Two starts in a row that wanted another one, and had no checkpoint newer than the
one that they began with, are the last of their job.

    <output_dir>/slurm/no-progress-<job>-<start>   this start was such a one
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path

from bigtrain.cluster.lifeline import Verdict
from bigtrain.cluster.signals import EXIT_AGAIN
from bigtrain.plan import RunPlan
from bigtrain.slurm import identity

EXIT_WITHOUT_PROGRESS = 1
_COMMITTED = re.compile(r"checkpoint-(\d+)")


class Progress:
    """Of one start of a job; made before anything is trained."""

    def __init__(self, plan: RunPlan, *, environment: Mapping[str, str]) -> None:
        job_id = environment.get("SLURM_JOB_ID", "")
        restarts = identity.restart_count(environment)
        self._plan = plan
        self._directory = Path(plan.output_dir)
        self._mark = self._directory / "slurm" / f"no-progress-{job_id}-{restarts}"
        self._mark_before = self._mark.with_name(f"no-progress-{job_id}-{restarts - 1}")
        self._began_with = self._newest()

    def judge(self, verdict: Verdict) -> Verdict:
        """The verdict, or one that ends the job for good. Says the same on every node that asks."""
        has_come_on = self._newest() != self._began_with
        if verdict.code != EXIT_AGAIN or has_come_on or not self._is_visible():
            return verdict
        with contextlib.suppress(OSError):
            self._mark.parent.mkdir(parents=True, exist_ok=True)
            self._mark.touch()
        if not self._mark_before.exists():
            return verdict
        cause = "\n".join(filter(None, (verdict.cause, self._why_not_again(verdict))))
        return dataclasses.replace(verdict, code=EXIT_WITHOUT_PROGRESS, cause=cause)

    def _why_not_again(self, verdict: Verdict) -> str:
        began = self._began_with
        where = "no checkpoint" if began is None else f"checkpoint-{began}"
        guess = "is the time limit too short for a start and a save?"
        if verdict.lost:
            guess = "does the run itself take nodes down, by its memory?"
        return (
            f"the second start in a row that saved nothing new ({where}): the job is not put back "
            f"into the queue; {guess} Submit it again to go on"
        )

    def _is_visible(self) -> bool:
        """A script may keep checkpoints of its own."""
        return self._plan.kind == "run_file" or self._newest() is not None

    def _newest(self) -> int | None:
        """The step of the newest checkpoint; by its name alone, since all nodes look for it."""
        try:
            found = [_COMMITTED.fullmatch(path.name) for path in self._directory.iterdir()]
        except OSError:
            return None
        return max((int(match[1]) for match in found if match), default=None)
