"""Whose directory `output_dir` is: a run may go on in its own, and not write into another's."""

from __future__ import annotations

import re
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bigtrain.checkpoint import lease
from bigtrain.checkpoint.staging import time_of_commit
from bigtrain.errors import ConfigError
from bigtrain.plan import RunPlan, read_plan
from bigtrain.planning.writable import refusal

_PLAN_NAME = re.compile(r"attempt-(\d+)\.json")


def plan_path(plan: RunPlan) -> Path:
    """Where the plan of this attempt is recorded."""
    return Path(plan.output_dir) / "plans" / f"attempt-{plan.attempt:02d}.json"


def next_attempt(output_dir: Path) -> int:
    """One more than the highest attempt that has left a plan."""
    return max((number for number, _ in _recorded(output_dir)), default=0) + 1


def run_id(output_dir: Path, *, begins_anew: bool) -> str:
    """The id of the run that the directory's newest attempt belongs to, or else a new one."""
    earlier = None if begins_anew else _newest(output_dir)
    return (earlier.run_id if earlier else "") or uuid.uuid4().hex


def begun_anew(output_dir: Path, *, resume: str) -> str:
    """As `RunPlan.begun_anew` has it, for an attempt that goes on as `resume` says.

    A checkpoint that was named is the run's own from then on, and so are all others.
    """
    if resume == "never":
        return time_of_commit(output_dir)
    earlier = _newest(output_dir) if resume in ("auto", "script") else None
    return earlier.begun_anew if earlier else ""


def _newest(output_dir: Path) -> RunPlan | None:
    """The plan of the newest attempt; None where there is none that can be read."""
    recorded = _recorded(output_dir)
    try:
        return read_plan(max(recorded)[1]) if recorded else None
    except ConfigError:
        return None


def check_output_dir(plan: RunPlan) -> None:
    """ConfigError where the directory is in use by another run, unless it is to be gone on with."""
    output_dir = Path(plan.output_dir)
    if output_dir.exists() and not output_dir.is_dir():
        raise ConfigError(f"output_dir: {output_dir} is a file; give a directory")
    if why := unwritable(plan):
        raise ConfigError(why)
    if plan.training.get("overwrite_output_dir"):
        return
    occupant = _occupant(plan, output_dir)
    if occupant:
        origin = plan.origins.get("output_dir")
        said = f"{origin}: " if origin else ""
        raise ConfigError(
            f"{said}output_dir: {output_dir} {occupant}; give another --output-dir, "
            "or go on in it with --set training.overwrite_output_dir=true"
        )


def unwritable(plan: RunPlan) -> str:
    """Why nothing can be written there on this machine; else empty."""
    why = refusal(Path(plan.output_dir))
    said = plan.origins.get("output_dir")
    where = f"{said}: output_dir" if said else "output_dir"
    return f"{where}: {plan.output_dir}: {why}; give another --output-dir" if why else ""


def check_not_in_use(plan: RunPlan) -> None:
    """ConfigError where a run is writing there now: its own ranks would say so only later."""
    output_dir = Path(plan.output_dir)
    holder = lease.living_holder(output_dir)
    if holder is not None:
        raise ConfigError(f"output_dir: {lease.in_use(output_dir, holder)}")


def _occupant(plan: RunPlan, output_dir: Path) -> str:
    """Whose the directory is, as the end of a sentence; empty where it is free or this run's."""
    files = _stray_files(output_dir)
    recorded = _recorded(output_dir)
    if not recorded or not files:  # attempts that have left plans and logs alone own nothing
        return files
    _, path = max(recorded)
    try:
        earlier = read_plan(path)
    except ConfigError:
        return f"holds a plan that can't be read ({path.name})"
    if earlier.name != plan.name:
        return f"belongs to the run {earlier.name!r}, and this one is {plan.name!r}"
    if _identity(earlier.model) != _identity(plan.model):
        return f"belongs to a run {plan.name!r} of another model"
    return ""


def _identity(model: Mapping[str, Any]) -> Any:
    """What makes it the same model; how it computes may change between attempts."""
    return {key: model.get(key) for key in ("name", "revision", "config")}


def _stray_files(output_dir: Path) -> str:
    if not output_dir.is_dir():
        return ""
    names = sorted(entry.name for entry in output_dir.iterdir() if entry.name[0] != ".")
    if not names or set(names) <= {"plans", "logs"}:
        return ""
    return f"holds files that are not this run's ({', '.join(names[:3])})"


def _recorded(output_dir: Path) -> list[tuple[int, Path]]:
    folder = output_dir / "plans"
    found = ((_PLAN_NAME.fullmatch(path.name), path) for path in folder.glob("attempt-*.json"))
    return [(int(match[1]), path) for match, path in found if match]
