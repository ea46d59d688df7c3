"""`engine: auto` for a run file: each way to train is planned, and the first that fits is taken."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

from bigtrain.errors import ConfigError
from bigtrain.memory.discovery import Model
from bigtrain.memory.estimate import MemoryPlan, estimate
from bigtrain.plan import RunPlan
from bigtrain.planning.device_memory import rank_memory
from bigtrain.planning.engine_choice import Candidate, candidates, choose
from bigtrain.planning.forecast import memory_request, model_of
from bigtrain.run_config import RunConfig
from bigtrain.translate.config import ENGINE_NAMES

PlanWith = Callable[[RunConfig], RunPlan]


def refine(
    plan: RunPlan,
    config: RunConfig,
    *,
    plan_with: PlanWith,
    environment: Mapping[str, str],
    device_memory: int | None,
) -> RunPlan:
    """The plan on the engine that memory chooses; `plan` itself where memory can't be known."""
    topology = plan.topology
    model = model_of(plan, environment)
    choice = choose(
        _ways(plan),
        memory_of=lambda way: _memory(plan_with(configure(config, way)), model),
        device_memory=rank_memory(
            plan.device,
            procs_per_node=topology.procs_per_node,
            said=device_memory,
            environment=environment,
        ),
    )
    if choice is None:
        return plan
    chosen = plan_with(configure(config, choice.candidate))
    options = {f"engine.{key}": "auto" for key, _ in choice.candidate.options}
    origins = {**chosen.origins, **options, "engine.name": choice.why}
    return dataclasses.replace(chosen, origins=origins)


def side_by_side(
    plan: RunPlan, config: RunConfig, *, plan_with: PlanWith
) -> list[tuple[Candidate, RunPlan | None, str]]:
    """Every engine and every way that `auto` would try: its plan, or else why there is none."""
    ways = [Candidate(engine=name) for name in ENGINE_NAMES]
    ways += [way for way in _ways(plan) if way not in ways]
    found: list[tuple[Candidate, RunPlan | None, str]] = []
    for way in ways:
        try:
            found.append((way, plan_with(configure(config, way)), ""))
        except ConfigError as error:
            found.append((way, None, error.faults[0]))
    return found


def _ways(plan: RunPlan) -> list[Candidate]:
    return list(
        candidates(
            nodes=plan.topology.nodes,
            procs_per_node=plan.topology.procs_per_node,
            on_gpu=plan.device == "cuda",
            accumulates=int(plan.training.get("gradient_accumulation_steps") or 1) > 1,
        )
    )


def configure(config: RunConfig, way: Candidate) -> RunConfig:
    """`config` on that engine. Options that were said for it stay."""
    update = {"name": way.engine, **dict(way.options)}
    return dataclasses.replace(config, engine=config.engine.model_copy(update=update))


def _memory(plan: RunPlan, model: Model) -> MemoryPlan | None:
    return None if model.shapes is None else estimate(memory_request(plan, model))
