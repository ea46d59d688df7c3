"""Which nodes run an attempt of a plan, and under which number: the first node decides for all.

A run may have more nodes than it needs. Those that no attempt names are spare, and take the places
of nodes that are lost.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bigtrain.errors import LaunchError
from bigtrain.plan import RunPlan, read_plan, write_plan

_DECIDED = ("attempt", "run_id", "begun_anew", "resume")
"""Fields of the plan that are not the same in every attempt."""


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """What all nodes are told of an attempt. As a message it is `dataclasses.asdict` of it."""

    fields: Mapping[str, Any]
    """Of the plan: those that were decided."""
    plan_name: str
    """The file that records the plan."""
    places: tuple[int, ...]
    """The nodes that run it, by the ranks under which they met, in the order of their ranks in it.
    Node 0 stays node 0: it has the store."""

    @classmethod
    def from_message(cls, message: Mapping[str, Any]) -> Attempt:
        return cls(**{**message, "places": tuple(message["places"])})

    def plan_of(self, plan: RunPlan, plan_path: Path) -> tuple[RunPlan, Path]:
        """The attempt's plan, from the one that the nodes were started with, and this node's file
        of it."""
        chosen = dataclasses.replace(plan, **{name: self.fields[name] for name in _DECIDED})
        path = plan_path.with_name(self.plan_name)
        if not path.exists():  # a disk that is not shared
            with contextlib.suppress(LaunchError):  # another node of the same disk was faster
                write_plan(chosen, path)
        return chosen, path.resolve()


def claim(plan: RunPlan, plan_path: Path, *, again: bool, places: Sequence[int]) -> Attempt:
    """An attempt whose plan is recorded: no other start of the run has its number.

    A node that was thought lost may still write for minutes; what it writes bears its own number.
    `again`: the run was started before, and goes on from its last checkpoint.
    """
    if not again and plan_path.is_file() and read_plan(plan_path) == plan:
        return _attempt(plan, plan_path, places)
    first = plan.attempt + 1 if again else plan.attempt
    for attempt in range(first, first + 10_000):
        resume = "auto" if again else plan.resume
        claimed = dataclasses.replace(plan, attempt=attempt, resume=resume)
        path = plan_path.with_name(f"attempt-{attempt:02d}.json")
        if path.exists():
            continue
        try:
            write_plan(claimed, path)
            return _attempt(claimed, path, places)
        except LaunchError:
            continue
    raise LaunchError(f"{plan_path.parent} holds plans of ten thousand attempts; clear it up")


def with_spares(places: Sequence[int], alive: Collection[int]) -> tuple[int, ...] | None:
    """The places with spare nodes on those of lost ones; None where there are too few, or where
    node 0 is lost, without which the nodes don't find each other."""
    spares = [node for node in sorted(alive) if node not in places]
    taken: list[int] = []
    for node in places:
        if node in alive:
            taken.append(node)
        elif node == 0 or not spares:
            return None
        else:
            taken.append(spares.pop(0))
    return tuple(taken)


def _attempt(plan: RunPlan, path: Path, places: Sequence[int]) -> Attempt:
    fields = {name: getattr(plan, name) for name in _DECIDED}
    return Attempt(fields=fields, plan_name=path.name, places=tuple(places))
