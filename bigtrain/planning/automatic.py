"""`engine: auto` for a run file: each way to train is planned, and the first that fits is taken."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeAlias

from bigtrain.errors import ConfigError
from bigtrain.memory.discovery import Model
from bigtrain.memory.estimate import MemoryPlan, estimate
from bigtrain.memory.timeline import EVALUATION
from bigtrain.plan import RunPlan
from bigtrain.planning.device_memory import DeviceMemory
from bigtrain.planning.engine_choice import Candidate, candidates, choose
from bigtrain.planning.forecast import memory_request, model_of
from bigtrain.planning.processes import Processes
from bigtrain.run_config import RunConfig
from bigtrain.translate.config import ENGINE_NAMES

PlanWith: TypeAlias = Callable[[RunConfig], RunPlan]
Planned: TypeAlias = tuple[Candidate, RunPlan | ConfigError]
_WHERE_MEMORY_IS_UNKNOWN = ("single", "fsdp", "zero3")


def plan_on_the_fastest(
    config: RunConfig,
    processes: Processes,
    *,
    plan_with: PlanWith,
    environment: Mapping[str, str],
    memory_of: Callable[[RunPlan], DeviceMemory],
) -> RunPlan:
    """The plan on the engine that memory chooses; where memory can't be known, on fsdp.

    Raises ConfigError where no engine can have what the run asks for.
    """
    plans = _possible(config, processes, plan_with=plan_with)
    first = next(iter(plans.values()))
    model = model_of(first, environment)
    choice = choose(
        list(plans),
        memory_of=lambda way: _memory(plans[way], model),
        device_memory=memory_of(first),
    )
    if choice is None:
        usual = (plan for plan in plans.values() if plan.engine.name in _WHERE_MEMORY_IS_UNKNOWN)
        return next(usual, first)
    chosen = plans[choice.candidate]
    options = {f"engine.{key}": "auto" for key, _ in choice.candidate.options}
    why = choice.why + _advice(_memory(chosen, model))
    origins = {**chosen.origins, **options, "engine.name": why}
    return dataclasses.replace(chosen, origins=origins)


def _advice(memory: MemoryPlan | None) -> str:
    if memory is None or memory.peak_moment.name != EVALUATION:
        return ""
    return "; most of it in the evaluation: see training.per_device_eval_batch_size"


def side_by_side(
    config: RunConfig, processes: Processes, *, plan_with: PlanWith
) -> list[tuple[Candidate, RunPlan | None, str]]:
    """Every engine and every way that `auto` would try: its plan, or else why there is none."""
    ways = [Candidate(engine=name) for name in ENGINE_NAMES]
    ways += [way for way in _ways(config, processes) if way not in ways]
    return [
        (way, None, made.faults[0]) if isinstance(made, ConfigError) else (way, made, "")
        for way, made in _tried(config, ways, plan_with=plan_with)
    ]


def _possible(
    config: RunConfig, processes: Processes, *, plan_with: PlanWith
) -> dict[Candidate, RunPlan]:
    """The ways that this run can take, with their plans: the usual ones, else any."""
    ways = _ways(config, processes)
    others = [Candidate(engine=name) for name in ENGINE_NAMES]
    tried: list[Planned] = []
    for some in (ways, [way for way in others if way not in ways]):
        tried += _tried(config, some, plan_with=plan_with)
        plans = {way: made for way, made in tried if isinstance(made, RunPlan)}
        if plans:
            return plans
    refusals = [made for _, made in tried if isinstance(made, ConfigError)]
    raise min(refusals, key=lambda error: len(error.faults))


def _tried(
    config: RunConfig, ways: Iterable[Candidate], *, plan_with: PlanWith
) -> Sequence[Planned]:
    found: list[Planned] = []
    for way in ways:
        try:
            found.append((way, plan_with(configure(config, way))))
        except ConfigError as error:
            found.append((way, error))
    return found


def _ways(config: RunConfig, processes: Processes) -> list[Candidate]:
    """Those that leave standing what the engine section says."""
    accumulates = int(config.training.get("gradient_accumulation_steps") or 1) > 1
    found = candidates(
        nodes=processes.topology.nodes,
        procs_per_node=processes.topology.procs_per_node,
        on_gpu=processes.device == "cuda",
        accumulates=accumulates or config.global_batch_size is not None,
    )
    said = config.engine
    return [
        way
        for way in found
        if all(getattr(said, key) in (None, value) for key, value in way.options)
    ]


def configure(config: RunConfig, way: Candidate) -> RunConfig:
    """`config` on that engine. Options that were said for it stay."""
    update = {"name": way.engine, **dict(way.options)}
    return dataclasses.replace(config, engine=config.engine.model_copy(update=update))


def _memory(plan: RunPlan, model: Model) -> MemoryPlan | None:
    return None if model.shapes is None else estimate(memory_request(plan, model))
