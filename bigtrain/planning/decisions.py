"""The decisions of a run in their order, from the words on a command line to a RunPlan.

A run file is read, completed and translated. Of a script only the processes, the engine and the
way of starting are decided: it makes its own model, data and arguments.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bigtrain import run_inputs
from bigtrain.arguments.schema import defaults, load_schema
from bigtrain.arguments.values import nearest
from bigtrain.errors import ConfigError, UnsupportedError
from bigtrain.layers import in_order
from bigtrain.paths import below
from bigtrain.plan import RunPlan
from bigtrain.planning import automatic, nvme, preloading
from bigtrain.planning.batch_size import Accumulation, accumulation
from bigtrain.planning.device_memory import DeviceMemory, rank_memory
from bigtrain.planning.engine_choice import Candidate
from bigtrain.planning.launching import launching, place, resume
from bigtrain.planning.model_shape import ModelShape, read_shape
from bigtrain.planning.output_dir import check_output_dir
from bigtrain.planning.processes import Processes, processes_of
from bigtrain.planning.request import Request, Surroundings, foreign_overrides
from bigtrain.planning.script_plan import plan_script
from bigtrain.run_config import Reading, RunConfig, read_run_config
from bigtrain.share import bundled
from bigtrain.translate import consistency, foreign, translate
from bigtrain.translate.config import ArgumentFate, Translation
from bigtrain.translate.translation import with_origins

_RUN_FILES = (".yaml", ".yml")


def make_plan(request: Request, surroundings: Surroundings) -> RunPlan:
    """The plan of the run that was asked for. ConfigError tells all that stands against it."""
    target = _find_target(request.target, surroundings.working_dir)
    if target.suffix in _RUN_FILES:
        plan = _plan_run_file(target, request, surroundings)
    else:
        plan = plan_script(target, request, surroundings)
    if not surroundings.is_rehearsal:
        nvme.refuse(
            plan, surroundings.environment, is_elsewhere=surroundings.gpus_of_nodes is not None
        )
    return plan


def _plan_run_file(target: Path, request: Request, surroundings: Surroundings) -> RunPlan:
    if request.script_args:
        raise ConfigError(
            f"{request.target} is a run file and takes no arguments "
            f"({' '.join(request.script_args)}); use --set section.key=value"
        )
    reading = _read(target, request, surroundings)
    if reading.config is None:
        raise ConfigError(reading.faults)
    try:
        plan = _planned(reading.config, target, request, surroundings)
    except ConfigError as error:
        more = [fault for fault in error.faults if not reading.follows(fault)]
        raise type(error)(in_order([*reading.faults, *more])) from error
    if reading.faults:
        raise ConfigError(reading.faults)
    if not surroundings.is_rehearsal:
        check_output_dir(plan)
    return plan


def _find_target(name: str, working_dir: Path) -> Path:
    path = below(working_dir, name)
    if path.is_dir():
        raise ConfigError(f"{name} is a directory; give a run file (.yaml) or a script (.py)")
    found = path if path.is_file() else bundled(name)
    if found is None:
        names = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
        close = None if path.name in names else nearest(path.name, names)
        hint = f"; did you mean {Path(name).with_name(close)}?" if close else ""
        raise ConfigError(f"{name}: there is no such file{hint}")
    if found.suffix not in (*_RUN_FILES, ".py"):
        raise ConfigError(f"{name}: give a run file (.yaml) or a script (.py)")
    return found


def _load(target: Path, request: Request, surroundings: Surroundings) -> RunConfig:
    reading = _read(target, request, surroundings)
    if reading.config is None or reading.faults:
        raise ConfigError(reading.faults)
    return reading.config


def _read(target: Path, request: Request, surroundings: Surroundings) -> Reading:
    """The run file, completed by the configs that it names."""
    elsewhere = surroundings.device_memory is not None
    reading = read_run_config(
        target,
        label=_as_shown(target, surroundings),
        overrides=request.overrides,
        foreign=foreign_overrides(request, surroundings),
        root=None if elsewhere else surroundings.working_dir,
    )
    return reading if reading.config is None else _filled(reading.config, reading)


def _planned(
    config: RunConfig, target: Path, request: Request, surroundings: Surroundings
) -> RunPlan:
    """As `plan_of`, on the engine that `auto` chooses; what is missing on this machine is told with
    all else that is wrong."""
    elsewhere = surroundings.device_memory is not None
    missing = [] if elsewhere else _missing(config, surroundings.working_dir)
    try:
        if config.engine.name == "auto" and foreign.asked_engine(config.training) is None:
            plan = automatic.plan_on_the_fastest(
                config,
                processes_of(config, config.training, surroundings),
                plan_with=lambda chosen: plan_of(chosen, target, request, surroundings),
                environment=surroundings.environment,
                memory_of=surroundings.memory_of or _memory_here(surroundings),
            )
        else:
            plan = plan_of(config, target, request, surroundings)
    except ConfigError as error:
        raise ConfigError([*missing, *error.faults]) from error
    if missing:
        raise ConfigError(missing)
    return plan


def _memory_here(surroundings: Surroundings) -> Callable[[RunPlan], DeviceMemory]:
    return lambda plan: rank_memory(
        plan.device,
        procs_per_node=plan.topology.procs_per_node,
        said=surroundings.device_memory,
        environment=surroundings.environment,
    )


def missing_of(request: Request, surroundings: Surroundings) -> list[str]:
    """What a run file names and is not on this machine, though the plan may be for another one."""
    target = _find_target(request.target, surroundings.working_dir)
    if target.suffix not in _RUN_FILES:
        return []
    return _missing(_load(target, request, surroundings), surroundings.working_dir)


def _missing(config: RunConfig, root: Path) -> list[str]:
    """Each with where it was said."""
    found = [
        *run_inputs.faults(config.data, config.model, config.tokenizer, root=root),
        *run_inputs.package_faults(config.training),
    ]
    return [f"{place}: {key}: {why}" for key, why in found if (place := _said_at(config, key))]


def _said_at(config: RunConfig, key: str) -> str:
    section = key.partition(".")[0]
    return config.origins.get(key) or config.origins.get(section) or "default"


def compare_engines(
    request: Request, surroundings: Surroundings
) -> list[tuple[Candidate, RunPlan | None, str]]:
    """A run file's plan on every engine, or why there is none."""
    target = _find_target(request.target, surroundings.working_dir)
    if target.suffix not in _RUN_FILES:
        raise ConfigError(f"{request.target} is a script, whose model is its own; give a run file")
    config = _load(target, request, surroundings)
    return automatic.side_by_side(
        config,
        processes_of(config, config.training, surroundings),
        plan_with=lambda chosen: plan_of(chosen, target, request, surroundings),
    )


def plan_of(
    config: RunConfig, target: Path, request: Request, surroundings: Surroundings
) -> RunPlan:
    """The plan of a whole config. Nothing outside of it is asked but the machine."""
    processes = processes_of(config, config.training, surroundings)
    shape = read_shape(config.model, surroundings.working_dir)
    training, translation = _translated(config, processes, shape)
    going_on = resume(request.resume, config.training, surroundings.working_dir)
    derived = {f"training.{name}": "derived" for name in training if name not in config.training}
    return RunPlan(
        name=config.name,
        kind="run_file",
        engine=translation.engine,
        options=foreign.merge(config.engine.options(), config.training),
        fates=translation.fates,
        model=config.model.said(),
        tokenizer=config.tokenizer.said() if config.tokenizer else {},
        data=config.data.said(),
        training=training,
        preload=preloading.for_run_file(processes.engine, shape.model_type, training),
        origins={**derived, **config.origins, **processes.origins},
        **place(target, config.output_dir, surroundings, resume=going_on),
        **launching(processes, config.cluster, fresh_reason=""),
    )


def _filled(config: RunConfig, reading: Reading) -> Reading:
    """With what given configs say where the run file says nothing."""
    try:
        training, unreadable = foreign.sound(config.training)
    except ConfigError as error:
        faults = in_order([*reading.faults, *_at_deepspeed(error.faults, config)])
        return dataclasses.replace(reading, config=None, faults=tuple(faults))
    wrong = {key.rpartition(".")[2] for key, _ in unreadable}
    faults = [*reading.faults, *_at_deepspeed([why for _, why in unreadable], config)]
    values = {field: value for field, (value, _) in foreign.implied(training).items()}
    origins = foreign.implied_origins(training, config.origins) | dict(config.origins)
    size, given = config.global_batch_size, foreign.global_batch(training, config.origins)
    if given is not None and size not in (None, given[0]):
        wrong |= {"global_batch_size", "train_batch_size"}
        faults.append(
            f"{config.origins['global_batch_size']}: global_batch_size: {size}, but {given[1]} is "
            f"{given[0]}; neither wins: make them equal, or leave one out"
        )
    if given is not None and size is None:
        size, origins["global_batch_size"] = given
    filled = dataclasses.replace(
        config, global_batch_size=size, training={**training, **values}, origins=origins
    )
    return Reading(config=filled, faults=tuple(in_order(faults)), wrong=reading.wrong | wrong)


def _at_deepspeed(faults: Sequence[str], config: RunConfig) -> list[str]:
    place = config.origins.get("training.deepspeed")
    return [f"{place}: {why}" if place else why for why in faults]


def _as_shown(target: Path, surroundings: Surroundings) -> str:
    """The path as messages name it: short where it lies below the working directory."""
    if target.is_relative_to(surroundings.working_dir):
        return str(target.relative_to(surroundings.working_dir))
    return str(target)


def _translated(
    config: RunConfig, processes: Processes, shape: ModelShape
) -> tuple[dict[str, Any], Translation]:
    """What the worker makes its TrainingArguments of, and what the engine makes of that.

    Raises ConfigError with the faults of both.
    """
    training = {k: v for k, v in config.training.items() if k != "resume_from_checkpoint"}
    faults: list[str] = []
    batch: Accumulation | None = None
    try:
        whole = defaults(load_schema()) | training
        batch = accumulation(config, whole, processes.topology)
    except ConfigError as error:
        faults += error.faults
    if batch is not None:
        training[batch.argument] = batch.value
    wrong = consistency.faults(defaults(load_schema()) | training)
    faults += with_origins(((f"training.{name}", why) for name, why in wrong), config.origins)
    try:
        translation = translate(
            training,
            engine=processes.engine,
            topology=processes.topology,
            device=processes.device,
            options=config.engine.options(),
            hidden_size=shape.hidden_size,
            origins=config.origins,
        )
    except UnsupportedError as error:
        faults += error.faults
    if faults:
        raise ConfigError(faults)
    return training, _with_derivation(translation, batch)


def _with_derivation(translation: Translation, batch: Accumulation | None) -> Translation:
    if batch is None:
        return translation
    derived = ArgumentFate(argument=batch.argument, fate="derived", detail=batch.derivation)
    fates = (derived if fate.argument == derived.argument else fate for fate in translation.fates)
    return dataclasses.replace(translation, fates=tuple(fates))
