"""The decisions of a run in their order, from the words on a command line to a RunPlan.

A run file is read, completed and translated. Of a script only the processes, the engine and the
way of starting are decided: it makes its own model, data and arguments.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from bigtrain.arguments.schema import defaults, load_schema
from bigtrain.arguments.values import nearest
from bigtrain.cluster import threads
from bigtrain.errors import ConfigError, UnsupportedError
from bigtrain.layers import Override
from bigtrain.plan import RunPlan
from bigtrain.planning import automatic, preloading
from bigtrain.planning.batch_size import Accumulation, accumulation
from bigtrain.planning.engine_choice import Candidate
from bigtrain.planning.model_shape import ModelShape, read_shape
from bigtrain.planning.output_dir import check_output_dir, next_attempt
from bigtrain.planning.processes import Processes, choose_processes
from bigtrain.planning.script_source import ScriptFacts, read_script
from bigtrain.run_config import RunConfig, ScriptConfig, load_run_config, load_script_config
from bigtrain.run_file import read_run_file
from bigtrain.sections import ClusterSection
from bigtrain.share import bundled
from bigtrain.topology import RankInfo
from bigtrain.translate import accelerate_config, accelerate_environment, foreign, translate
from bigtrain.translate.config import ArgumentFate, Translation, uses_nvme

_RUN_FILES = (".yaml", ".yml")


@dataclass(frozen=True, kw_only=True)
class Request:
    """What was asked for on the command line."""

    target: str
    """A run file or a Python script: a path, or the name of a bundled file."""
    script_args: tuple[str, ...] = ()
    overrides: tuple[Override, ...] = ()
    """In order of precedence, the strongest last: `--set`, then flags."""
    resume: str | None = None
    """`auto`, `never`, or a checkpoint's path. None: as the run file says, else auto; for a
    script, as its own call of `train` says."""
    accelerate_config: str | None = None
    """Path of a config file of accelerate's."""


@dataclass(frozen=True, kw_only=True)
class Surroundings:
    """Where the planning happens, read once by whoever starts it."""

    environment: Mapping[str, str]
    working_dir: Path
    world: RankInfo | None = None
    """The place that another launcher gave this process; None where bigtrain launches."""
    is_rehearsal: bool = False
    """True where nothing will start here: this machine's limits and output_dir don't count."""
    device_memory: int | None = None
    """Bytes of each rank's GPU, where it was said; the run is then one on GPUs."""
    gpus_of_nodes: Callable[[ClusterSection], int] | None = None
    """GPUs of each node that the run will have, where it starts on other machines than this."""


def make_plan(request: Request, surroundings: Surroundings) -> RunPlan:
    """The plan of the run that was asked for. ConfigError tells all that stands against it."""
    target = _find_target(request.target, surroundings.working_dir)
    if target.suffix not in _RUN_FILES:
        return _plan_script(target, request, surroundings)
    if request.script_args:
        raise ConfigError(
            f"{request.target} is a run file and takes no arguments "
            f"({' '.join(request.script_args)}); use --set section.key=value"
        )
    return _plan_run_file(target, request, surroundings)


def _find_target(name: str, working_dir: Path) -> Path:
    path = working_dir / Path(name).expanduser()
    if path.is_dir():
        raise ConfigError(f"{name} is a directory; give a run file (.yaml) or a script (.py)")
    found = path if path.is_file() else bundled(name)
    if found is None:
        names = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
        close = nearest(path.name, names)
        hint = f"; did you mean {Path(name).with_name(close)}?" if close else ""
        raise ConfigError(f"{name}: there is no such file{hint}")
    if found.suffix not in (*_RUN_FILES, ".py"):
        raise ConfigError(f"{name}: give a run file (.yaml) or a script (.py)")
    return found


def _plan_run_file(target: Path, request: Request, surroundings: Surroundings) -> RunPlan:
    config = load_run_config(
        target,
        label=_as_shown(target, surroundings),
        overrides=request.overrides,
        foreign=_foreign(request, surroundings),
    )
    config = _filled(config)
    plan = plan_of(config, target, request, surroundings)
    if config.engine.name == "auto" and foreign.asked_engine(config.training) is None:
        plan = automatic.refine(
            plan,
            config,
            plan_with=lambda chosen: plan_of(chosen, target, request, surroundings),
            environment=surroundings.environment,
            device_memory=surroundings.device_memory,
        )
    if not surroundings.is_rehearsal:
        check_output_dir(plan)
        _refuse_nvme(plan)
    return plan


def compare_engines(
    request: Request, surroundings: Surroundings
) -> list[tuple[Candidate, RunPlan | None, str]]:
    """A run file's plan on every engine, or why there is none."""
    target = _find_target(request.target, surroundings.working_dir)
    if target.suffix not in _RUN_FILES:
        raise ConfigError(f"{request.target} is a script, whose model is its own; give a run file")
    config = _filled(
        load_run_config(
            target,
            label=_as_shown(target, surroundings),
            overrides=request.overrides,
            foreign=_foreign(request, surroundings),
        )
    )
    plan = plan_of(config, target, request, surroundings)
    return automatic.side_by_side(
        plan, config, plan_with=lambda chosen: plan_of(chosen, target, request, surroundings)
    )


def plan_of(
    config: RunConfig, target: Path, request: Request, surroundings: Surroundings
) -> RunPlan:
    """The plan of a whole config. Nothing outside of it is asked but the machine."""
    processes = choose_processes(
        config.engine,
        config.cluster,
        environment=surroundings.environment,
        use_cpu=bool(config.training.get("use_cpu")),
        asked_by_arguments=foreign.asked_engine(config.training),
        world=surroundings.world,
        is_rehearsal=surroundings.is_rehearsal,
        assumes_gpus=surroundings.device_memory is not None,
        gpus_of_nodes=surroundings.gpus_of_nodes,
        origins=config.origins,
    )
    shape = read_shape(config.model, surroundings.working_dir)
    training, translation = _translated(config, processes, shape)
    derived = {f"training.{name}": "derived" for name in training if name not in config.training}
    return RunPlan(
        name=config.name,
        kind="run_file",
        engine=translation.engine,
        fates=translation.fates,
        model=config.model.said(),
        tokenizer=config.tokenizer.said() if config.tokenizer else {},
        data=config.data.said(),
        training=training,
        resume=_resume(request.resume, config.training, surroundings.working_dir),
        preload=preloading.for_run_file(processes.engine, shape.model_type, training),
        origins={**derived, **config.origins, **processes.origins},
        **_place(target, config.output_dir, surroundings),
        **_launching(processes, config.cluster, fresh_reason=""),
    )


def _foreign(request: Request, surroundings: Surroundings) -> list[Override]:
    """What accelerate's config file says, in a run file's keys."""
    if request.accelerate_config is None:
        return []
    path = surroundings.working_dir / Path(request.accelerate_config).expanduser()
    file = read_run_file(path, label=request.accelerate_config)
    if file.faults:
        raise ConfigError(file.faults)
    return accelerate_config.overrides(file.values, label=request.accelerate_config)


def _filled(config: RunConfig) -> RunConfig:
    """With what a given DeepSpeed JSON says where the run file says nothing."""
    found = foreign.implied(config.training)
    if not found:
        return config
    place = config.origins.get("training.deepspeed", "training.deepspeed")
    origins = {f"training.{field}": f"{place}: {key}" for field, (_, key) in found.items()}
    values = {field: value for field, (value, _) in found.items()}
    return dataclasses.replace(
        config,
        training={**config.training, **values},
        origins={**config.origins, **origins},
    )


def _refuse_nvme(plan: RunPlan) -> None:
    """State that DeepSpeed keeps on NVMe can't be saved by the engine; its own checkpoints can."""
    if uses_nvme(plan.engine):
        raise UnsupportedError(
            "engine: offload to nvme works for scripts with transformers' Trainer, whose "
            "checkpoints are DeepSpeed's own; for a run file, offload to cpu"
        )


def _plan_script(target: Path, request: Request, surroundings: Surroundings) -> RunPlan:
    config = load_script_config(request.overrides, foreign=_foreign(request, surroundings))
    filled = {field: value for field, (value, _) in foreign.implied(config.training).items()}
    training = {**config.training, **filled}
    facts = read_script(target)
    if facts.uses_bigtrain and training:
        raise ConfigError(
            f"{target.name} uses bigtrain's Trainer, whose arguments say "
            f"{', '.join(sorted(training))}: give it to the script, after --"
        )
    processes = choose_processes(
        config.engine,
        config.cluster,
        environment=surroundings.environment,
        use_cpu=bool(training.get("use_cpu")),
        asked_by_arguments=foreign.asked_engine(training),
        world=surroundings.world,
        is_rehearsal=surroundings.is_rehearsal,
        assumes_gpus=surroundings.device_memory is not None,
        gpus_of_nodes=surroundings.gpus_of_nodes,
        origins=config.origins,
    )
    translation = translate(
        training,
        engine=processes.engine,
        topology=processes.topology,
        device=processes.device,
        options=config.engine.options(),
        origins=config.origins,
    )
    name = config.name or target.stem
    launching = _script_launching(processes, config, facts, translation, training)
    told = {f"cluster.env.{variable}": "for accelerate" for variable in launching["environment"]}
    return RunPlan(
        name=name,
        kind="script",
        script_args=request.script_args,
        engine=translation.engine,
        training=training,
        resume=_resume(request.resume or "script", {}, surroundings.working_dir),
        preload=preloading.for_script(processes.engine, facts.preload),
        origins={**told, **config.origins, **processes.origins},
        **_place(target, config.output_dir or f"runs/{name}", surroundings),
        **launching,
    )


def _script_launching(
    processes: Processes,
    config: ScriptConfig,
    facts: ScriptFacts,
    translation: Translation,
    training: Mapping[str, Any],
) -> dict[str, Any]:
    """As `_launching`, with what accelerate reads where the script is not bigtrain's own kind."""
    fields = _launching(processes, config.cluster, fresh_reason=facts.fresh_reason)
    if not facts.uses_bigtrain:
        told = accelerate_environment.variables(
            translation.engine, device=processes.device, training=training
        )
        fields["environment"] = {**told, **fields["environment"]}
    return fields


def _place(target: Path, output_dir: str, surroundings: Surroundings) -> dict[str, Any]:
    """The fields of a plan that are paths, absolute, and the number of this attempt."""
    directory = (surroundings.working_dir / Path(output_dir).expanduser()).resolve()
    return {
        "source": str(target.resolve()),
        "working_dir": str(surroundings.working_dir),
        "output_dir": str(directory),
        "attempt": next_attempt(directory),
    }


def _launching(
    processes: Processes, cluster: ClusterSection, *, fresh_reason: str
) -> dict[str, Any]:
    """The fields of a plan that say how its processes are started."""
    method, reason = _start(cluster, fresh_reason)
    return {
        "topology": processes.topology,
        "device": processes.device,
        "environment": cluster.environment(),
        "start_method": method,
        "start_reason": reason,
        "threads_per_rank": threads.per_rank(processes.topology.procs_per_node),
        "max_restarts": cluster.max_restarts,
        "slurm": cluster.slurm,
        "interface": cluster.interface,
        "join_timeout_s": cluster.join_timeout_s,
    }


def _start(cluster: ClusterSection, fresh_reason: str) -> tuple[Literal["fork", "fresh"], str]:
    """The start method, and why where it was not asked for."""
    if sys.platform != "linux":
        return "fresh", f"{sys.platform} can't fork ranks safely"
    if cluster.start is None and fresh_reason:
        return "fresh", fresh_reason
    return cluster.start or "fork", ""


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
        training["gradient_accumulation_steps"] = batch.steps
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
    derived = ArgumentFate(
        argument="gradient_accumulation_steps", fate="derived", detail=batch.derivation
    )
    fates = (derived if fate.argument == derived.argument else fate for fate in translation.fates)
    return dataclasses.replace(translation, fates=tuple(fates))


def _resume(asked: str | None, training: Mapping[str, Any], working_dir: Path) -> str:
    """As `RunPlan.resume` has it. CheckpointError where a path holds no checkpoint."""
    said = training.get("resume_from_checkpoint") if asked is None else asked
    if said is None or said is True:
        return "auto"
    if said is False:
        return "never"
    if said in ("auto", "never", "script"):
        return str(said)
    from bigtrain.checkpoint.find import require_checkpoint

    path = (working_dir / Path(str(said)).expanduser()).resolve()
    require_checkpoint(path)
    return str(path)
