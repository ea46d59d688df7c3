"""What differs between two plans, key by key, with where each value was said."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bigtrain.errors import ConfigError
from bigtrain.plan import RunPlan, read_plan
from bigtrain.plan_report import leaves, origin, short

_NOTHING = "–"
_SHOWN_BESIDE = frozenset({"forecast", "commands", "script", "missing", "refused"})
"""What `--json` shows beside the plan itself."""
# About this attempt and this machine, not about what is trained.
_NOT_COMPARED = frozenset(
    {
        "fates",
        "origins",
        "attempt",
        "run_id",
        "begun_anew",
        "start_reason",
        "working_dir",
        "preload",
    }
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Difference:
    """One key that two plans disagree on."""

    key: str
    values: tuple[str, str]
    origins: tuple[str, str]

    def row(self) -> tuple[str, ...]:
        shown = (
            value if where == "default" else f"{value} ({where})"
            for value, where in zip(self.values, self.origins, strict=True)
        )
        return (self.key, *shown)


def differences(one: RunPlan, other: RunPlan) -> list[Difference]:
    """All keys on which the plans disagree; a key that one of them lacks is shown as –."""
    here, there = dict(_flat(one)), dict(_flat(other))
    keys = dict.fromkeys((*here, *there))
    return [
        Difference(
            key=key,
            values=(short(here.get(key, _NOTHING)), short(there.get(key, _NOTHING))),
            origins=(origin(one, key), origin(other, key)),
        )
        for key in keys
        if here.get(key, _NOTHING) != there.get(key, _NOTHING)
    ]


def recorded_plan(place: Path) -> RunPlan | None:
    """The plan in a JSON file, or the last one that a run's directory records; else None."""
    if place.suffix == ".json":
        return _shown_plan(place)
    if not place.is_dir():
        return None
    plans = sorted((place / "plans").glob("attempt-*.json"))
    if not plans:
        raise ConfigError(f"{place} holds no plan; give a run file, a plan, or a run's directory")
    return read_plan(plans[-1])


def _shown_plan(place: Path) -> RunPlan:
    """A recorded plan, or what `bigtrain plan --json` has shown."""
    try:
        content = json.loads(place.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return read_plan(place)  # which says what is wrong with it
    if not isinstance(content, dict) or not content.keys() & _SHOWN_BESIDE:
        return read_plan(place)
    kept = {key: value for key, value in content.items() if key not in _SHOWN_BESIDE}
    return RunPlan.from_json(json.dumps(kept))


def _flat(plan: RunPlan) -> Iterator[tuple[str, Any]]:
    content = dataclasses.asdict(plan)
    for key in _NOT_COMPARED:
        del content[key]
    options = content.pop("options")  # said in the section `engine`
    yield from leaves("engine", {key: value for key, value in options.items() if value is not None})
    yield from leaves("", content)
