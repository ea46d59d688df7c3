"""What `bigtrain plan` answers, as text: a plan with its forecast, a comparison, a difference."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bigtrain.errors import ConfigError
from bigtrain.layers import Override
from bigtrain.memory_report import as_json as forecast_as_json
from bigtrain.memory_report import comparison
from bigtrain.paths import below
from bigtrain.plan import RunPlan
from bigtrain.plan_diff import differences, recorded_plan
from bigtrain.plan_report import report, table
from bigtrain.planning import Request, Surroundings, compare_engines, make_plan, missing_of, nvme
from bigtrain.planning.device_memory import DeviceMemory, rank_memory
from bigtrain.planning.engine_choice import Candidate
from bigtrain.planning.forecast import Forecast, forecast, model_of, read_bytes
from bigtrain.planning.output_dir import unwritable


@dataclass(frozen=True, kw_only=True)
class Question:
    """What was asked on the command line."""

    target: str
    script_args: tuple[str, ...] = ()
    overrides: tuple[Override, ...]
    accelerate_config: str | None
    device_memory: str | None = None
    traces: bool = False
    shows_all: bool = False
    """Also what is at its default."""
    environment: Mapping[str, str]
    working_dir: Path

    def request(self) -> Request:
        return Request(
            target=self.target,
            script_args=self.script_args,
            overrides=self.overrides,
            accelerate_config=self.accelerate_config,
        )

    def surroundings(self) -> Surroundings:
        return Surroundings(
            environment=self.environment,
            working_dir=self.working_dir,
            is_rehearsal=True,
            device_memory=self.said_bytes(),
        )

    def said_bytes(self) -> int | None:
        return read_bytes(self.device_memory, label="--device-memory")


def show(question: Question, *, as_json: bool) -> str:
    """The plan and what is to come of it."""
    _refuse_trace_of_script(question)
    plan = make_plan(question.request(), question.surroundings())
    found = _forecast(plan, question) if plan.kind == "run_file" else None
    missing = missing_of(question.request(), question.surroundings())
    missing += filter(None, [unwritable(plan)])
    refused = [*nvme.refusals(plan), *_refused_model(found)]
    if as_json:
        beside = {"missing": missing, "refused": refused}
        return json.dumps(plan_as_json(plan, found) | beside, indent=2)
    return report(plan, found, missing=missing, refused=refused, shows_all=question.shows_all)


def _refused_model(found: Forecast | None) -> list[str]:
    """Why no launch could make the model."""
    return [found.model.why] if found is not None and found.model.is_refused else []


def forecast_there(
    plan: RunPlan, environment: Mapping[str, str], memory: DeviceMemory, *, asks: bool = True
) -> Forecast | None:
    """What is to come of a plan where each rank has `memory`; None for a script's.

    `asks`: also what only a process of its own can tell, in seconds.
    """
    if plan.kind != "run_file":
        return None
    model = model_of(plan, environment, asks=asks)
    return forecast(plan, environment=environment, device_memory=memory, model=model)


def plan_as_json(plan: RunPlan, found: Forecast | None) -> dict[str, Any]:
    """A plan with its forecast, for programs."""
    shown: dict[str, Any] = json.loads(plan.to_json())
    return shown | ({"forecast": forecast_as_json(found)} if found else {})


def compare(question: Question, *, as_json: bool) -> str:
    """All engines side by side."""
    plans = compare_engines(question.request(), question.surroundings())
    first = next((plan for _, plan, _ in plans if plan is not None), None)
    if first is None:
        raise ConfigError([f"engine {way}: {why}" for way, _, why in plans])
    model = model_of(first, question.environment)
    found: list[tuple[Candidate, Forecast | None, str]] = [
        (way, _forecast(plan, question, model=model) if plan else None, why)
        for way, plan, why in plans
    ]
    if as_json:
        return json.dumps(
            {
                str(way): forecast_as_json(made) if made else {"refused": why}
                for way, made, why in found
            },
            indent=2,
        )
    return f"Memory per rank, at the peak\n{table(comparison(found))}"


def diff(question: Question, other: str, *, as_json: bool) -> str:
    """What differs from another run file, with the same flags, or from a recorded plan."""
    plan = make_plan(question.request(), question.surroundings())
    place = below(question.working_dir, other)
    recorded = recorded_plan(place)
    if recorded is None:
        request = dataclasses.replace(question.request(), target=other)
        recorded = make_plan(request, question.surroundings())
    found = differences(plan, recorded)
    if as_json:
        return json.dumps([dataclasses.asdict(difference) for difference in found], indent=2)
    if not found:
        return f"{question.target} and {other} plan the same run"
    return table([("", question.target, other), *(difference.row() for difference in found)])


def answer(question: Question, *, compares: bool, other: str | None, as_json: bool) -> str:
    """What was asked for: the plan, all engines side by side, or what differs from another."""
    if other is not None:
        for flag, is_said in (("--compare", compares), ("--trace", question.traces)):
            if is_said:
                raise ConfigError(f"{flag}: --diff compares plans, not memory; ask one at a time")
        return diff(question, other, as_json=as_json)
    return (compare if compares else show)(question, as_json=as_json)


def _refuse_trace_of_script(question: Question) -> None:
    if question.traces and question.target.endswith(".py"):
        raise ConfigError(
            f"--trace: {question.target} is a script, whose model is its own; give a run file"
        )


def _forecast(plan: RunPlan, question: Question, **more: Any) -> Forecast:
    return forecast(
        plan,
        environment=question.environment,
        device_memory=_device_memory(plan, question),
        traces=question.traces,
        **more,
    )


def _device_memory(plan: RunPlan, question: Question) -> DeviceMemory:
    return rank_memory(
        plan.device,
        procs_per_node=plan.topology.procs_per_node,
        said=question.said_bytes(),
        environment=question.environment,
    )
