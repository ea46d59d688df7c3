"""What the trainer learns from the process's environment: the only place here that reads it."""

from __future__ import annotations

import os
from datetime import UTC, datetime
from pathlib import Path

from bigtrain.cluster.environment import LOG_DIR_VARIABLE, RESTART_VARIABLE
from bigtrain.cluster.events import EVENT_VARIABLE
from bigtrain.plan import PLAN_VARIABLE, RunPlan
from bigtrain.topology import RankInfo


def ranks() -> RankInfo:
    """Which process of the run this is."""
    return RankInfo.from_environment(os.environ)


def plan() -> RunPlan | None:
    """The plan of the run that this process belongs to; None without bigtrain's launcher."""
    from bigtrain.plan import current_plan

    return current_plan(os.environ)


def log_dir() -> Path | None:
    """Where this rank's log and metrics go; None without bigtrain's launcher."""
    value = os.environ.get(LOG_DIR_VARIABLE)
    return Path(value) if value else None


def is_restarted() -> bool:
    """True where the agent has started the ranks again after one failed."""
    return int(os.environ.get(RESTART_VARIABLE, "0")) > 0


def plan_written() -> datetime:
    """When this attempt was planned: what it saved itself is younger."""
    written = Path(os.environ[PLAN_VARIABLE]).stat().st_mtime
    return datetime.fromtimestamp(written, tz=UTC)


def begun_anew(plan: RunPlan | None) -> datetime | None:
    """When the run began anew beside checkpoints that are not its own; None where it never has."""
    return datetime.fromisoformat(plan.begun_anew) if plan and plan.begun_anew else None


def has_console() -> bool:
    """True where an agent listens for progress events."""
    return EVENT_VARIABLE in os.environ
