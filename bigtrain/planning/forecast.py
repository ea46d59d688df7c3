"""What is to come of a plan: steps, checkpoints, disk, and the memory of each rank."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from bigtrain.arguments.schema import defaults, load_schema
from bigtrain.errors import ConfigError
from bigtrain.memory.discovery import Model, cache_folder, find_model
from bigtrain.memory.disk import DiskPlan, disk_plan
from bigtrain.memory.estimate import MemoryPlan, Request, estimate
from bigtrain.memory.optimizers import optimizer_name, optimizer_shape
from bigtrain.memory.questions import Asker
from bigtrain.memory.trace import traced_estimate
from bigtrain.plan import RunPlan
from bigtrain.planning.device_memory import DeviceMemory

_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How long the run is. None: it depends on the data, which is not counted before it runs."""

    steps: int | None
    checkpoints: int | None
    tokens_per_step: int
    sequences_per_step: int


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """All that is known of a plan's future. None: it can't be known here; `unknown` says why."""

    schedule: Schedule
    model: Model
    memory: MemoryPlan | None
    other_memory: MemoryPlan | None
    """The same with activations kept where they are recomputed, or the other way round."""
    disk: DiskPlan | None
    device_memory: DeviceMemory
    procs_per_node: int = 1
    evaluation_batch: int = 0
    optimizer: str = ""
    """Its name, where what it keeps is not known and Adam's state is counted in its place."""
    unknown: str = ""


def forecast(
    plan: RunPlan,
    *,
    environment: Mapping[str, str],
    device_memory: DeviceMemory,
    traces: bool = False,
    model: Model | None = None,
) -> Forecast:
    """The future of a run file's plan. `traces`: activations from the real model, in seconds.

    `model` saves finding it again, where several engines are compared.
    """
    schedule = make_schedule(plan)
    model = model or model_of(plan, environment)
    if model.shapes is None:
        return _unknown(schedule, model, device_memory, model.why)
    request = memory_request(plan, model)
    memory = _memory(request, model, environment, traces=traces)
    if memory is None:
        why = "the widths of this family's activations are not known; --trace measures them"
        return _unknown(schedule, model, device_memory, why)
    turned = {"gradient_checkpointing": not request.recompute, "activation_checkpointing": None}
    return Forecast(
        schedule=schedule,
        model=model,
        memory=memory,
        other_memory=estimate(_replace_training(request, turned)),
        disk=disk_plan(request, checkpoints=schedule.checkpoints),
        device_memory=device_memory,
        procs_per_node=plan.topology.procs_per_node,
        evaluation_batch=request.batch("per_device_eval_batch_size").sequences,
        optimizer=_unknown_optimizer(plan),
    )


def _unknown_optimizer(plan: RunPlan) -> str:
    name = optimizer_name(plan.training)
    return "" if optimizer_shape(name).is_known else name


def model_of(plan: RunPlan, environment: Mapping[str, str], *, asks: bool = True) -> Model:
    """The plan's model, as far as it can be known here; without `asks`, at once. The hub's cache is
    where the ranks will have it."""
    return find_model(
        plan.model,
        tokenizer=plan.tokenizer,
        working_dir=Path(plan.working_dir),
        environment={**environment, **plan.environment},
        asks=asks,
    )


def memory_request(plan: RunPlan, model: Model) -> Request:
    """What the memory plan is made of."""
    assert model.shapes is not None
    return Request(
        shapes=model.shapes,
        config=plan.engine,
        topology=plan.topology,
        device=plan.device,
        training=plan.training,
        sequence_length=int(plan.data["sequence_length"]),
        evaluates=_evaluates(plan),
    )


def _evaluates(plan: RunPlan) -> bool:
    """Before, in between or at the end, where there is something to evaluate on."""
    has_data = plan.data.get("eval_files") or plan.data.get("eval_split") is not None
    said = plan.training
    while_training = str(said.get("eval_strategy") or "no") != "no" or said.get("eval_on_start")
    return bool(has_data) and bool(while_training or said.get("do_eval") is not False)


def make_schedule(plan: RunPlan) -> Schedule:
    """Steps and checkpoints to come, and what a step takes in."""
    values = defaults(load_schema()) | dict(plan.training)
    sequences = (
        int(values["per_device_train_batch_size"])
        * int(values["gradient_accumulation_steps"])
        * plan.topology.world_size
    )
    steps = int(values["max_steps"]) if values["max_steps"] and values["max_steps"] > 0 else None
    return Schedule(
        steps=steps,
        checkpoints=_checkpoints(values, steps),
        sequences_per_step=sequences,
        tokens_per_step=sequences * int(plan.data["sequence_length"]),
    )


def read_bytes(text: str | None, *, label: str) -> int | None:
    """`80GiB`, `40 GB` or a plain number of bytes, of which no device has less than a MiB. None
    where nothing was said."""
    if text is None:
        return None
    found = re.fullmatch(r"\s*(\d{1,15}(?:\.\d+)?)\s*([KMGT]i?B|B)?\s*", text, re.IGNORECASE)
    size = int(float(found[1]) * _UNITS[(found[2] or "B").upper()]) if found else 0
    if size < _UNITS["MIB"]:
        raise ConfigError(f"{label} {text:.60}: not a size; write 80GiB, for example")
    return size


def _checkpoints(values: Mapping[str, Any], steps: int | None) -> int | None:
    strategy = str(values["save_strategy"])
    if strategy == "no":
        return 0
    if strategy == "epoch" and steps is None:
        return math.ceil(float(values["num_train_epochs"]))  # the end of a part of one is one, too
    if strategy != "steps" or steps is None:
        return None
    every = values["save_steps"]
    interval = every if every >= 1 else max(1, math.ceil(steps * every))
    return math.ceil(steps / int(interval))  # the last step is saved, too


def _memory(
    request: Request, model: Model, environment: Mapping[str, str], *, traces: bool
) -> MemoryPlan | None:
    if not traces:
        return estimate(request)
    asker = Asker(cache=cache_folder(environment) / "shapes", environment=environment)
    question = {key: value for key, value in model.question.items() if key != "dtype"}
    return traced_estimate(request, question, asker=asker)


def _replace_training(request: Request, values: Mapping[str, Any]) -> Request:
    return replace(request, training={**request.training, **values})


def _unknown(schedule: Schedule, model: Model, device_memory: DeviceMemory, why: str) -> Forecast:
    return Forecast(
        schedule=schedule,
        model=model,
        memory=None,
        other_memory=None,
        disk=None,
        device_memory=device_memory,
        unknown=why,
    )


def verdict(
    memory: MemoryPlan, device_memory: DeviceMemory
) -> Literal["fits", "tight", "too large"] | None:
    """Whether it fits with the reserve that libraries and fragmentation need; None: not known."""
    if not device_memory.holds_offloaded(memory.host):
        return "too large"
    if device_memory.usable is None or device_memory.total is None:
        return None
    if memory.peak <= device_memory.usable:
        return "fits"
    return "tight" if memory.peak <= device_memory.total else "too large"
