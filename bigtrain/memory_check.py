"""Whether a run that is about to start, here or in a job, can fit, and what would."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial

from bigtrain.errors import BigtrainError, ConfigError
from bigtrain.layers import Override
from bigtrain.memory.timeline import EVALUATION
from bigtrain.plan import RunPlan
from bigtrain.plan_command import forecast_there
from bigtrain.planning.device_memory import DeviceMemory
from bigtrain.planning.engine_choice import size
from bigtrain.planning.forecast import Forecast, verdict

FLAG = "--no-memory-check"
_NOTHING = "no engine would fit here: bigtrain plan --compare shows what each of them needs"
_AUTO = Override(key="engine.name", value="auto", origin="auto")


def require_fit(
    plan: RunPlan,
    *,
    environment: Mapping[str, str],
    memory_of: Callable[[RunPlan], DeviceMemory],
    plan_with: Callable[[Override], RunPlan],
) -> None:
    """ConfigError where the plan says that it can't fit into the memory of its ranks.

    Nothing is said where memory is not known at once. `plan_with` makes the same plan with one more
    word on top, to find an engine that would fit.
    """
    find = partial(_found, environment=environment, memory_of=memory_of)
    found = find(plan)
    if found is None or found.memory is None or _verdict(found) != "too large":
        return
    memory, device = found.memory, found.device_memory
    what = f"engine {plan.engine.name} needs {size(memory.peak)} on each rank"
    there = f"there are {size(device.total or 0)} ({device.origin})"
    if not device.holds_offloaded(memory.host):
        what = f"engine {plan.engine.name} offloads {size(memory.host)} of each rank"
        there = f"the host has {size(device.host or 0)} for it"
    ways = [*_other_engine(plan_with, find), *_recomputing(found), *_evaluating_less(found)]
    advice = " or ".join(ways) or _NOTHING
    raise ConfigError(f"{what}, and {there}; {advice}; start it all the same with {FLAG}")


def _found(
    plan: RunPlan,
    *,
    environment: Mapping[str, str],
    memory_of: Callable[[RunPlan], DeviceMemory],
) -> Forecast | None:
    return forecast_there(plan, environment, memory_of(plan), asks=False)


def _verdict(found: Forecast) -> str | None:
    return None if found.memory is None else verdict(found.memory, found.device_memory)


def _other_engine(
    plan_with: Callable[[Override], RunPlan], find: Callable[[RunPlan], Forecast | None]
) -> list[str]:
    try:
        plan = plan_with(_AUTO)
        found = find(plan)
    except BigtrainError:
        return []
    if found is None or found.memory is None or _verdict(found) == "too large":
        return []
    return [f"--engine auto would fit ({plan.engine.name}, {size(found.memory.peak)})"]


def _evaluating_less(found: Forecast) -> list[str]:
    memory = found.memory
    if memory is None or memory.peak_moment.name != EVALUATION:
        return []
    training = tuple(moment for moment in memory.moments if moment.name != EVALUATION)
    if verdict(replace(memory, moments=training), found.device_memory) == "too large":
        return []
    batch = f"training.per_device_eval_batch_size below {found.evaluation_batch}"
    return [f"{batch} might fit (the evaluation needs the most)"]


def _recomputing(found: Forecast) -> list[str]:
    other, memory = found.other_memory, found.memory
    if other is None or memory is None or other.peak >= memory.peak:
        return []
    if verdict(other, found.device_memory) == "too large":
        return []
    return [f"training.gradient_checkpointing=true would fit ({size(other.peak)})"]
