"""The plan of a user's own script: of it only processes, engine and start are decided."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bigtrain import secrecy
from bigtrain.errors import ConfigError
from bigtrain.plan import RunPlan
from bigtrain.planning import preloading
from bigtrain.planning.launching import launching, place, resume
from bigtrain.planning.processes import Processes, processes_of
from bigtrain.planning.request import Request, Surroundings, foreign_overrides
from bigtrain.planning.script_source import ScriptFacts, read_script
from bigtrain.run_config import ScriptConfig, load_script_config
from bigtrain.translate import accelerate_environment, foreign, translate
from bigtrain.translate.config import Translation


def plan_script(target: Path, request: Request, surroundings: Surroundings) -> RunPlan:
    """A script's plan. ConfigError tells what stands against it."""
    config = load_script_config(request.overrides, foreign=foreign_overrides(request, surroundings))
    filled = {field: value for field, (value, _) in foreign.implied(config.training).items()}
    training = {**config.training, **filled}
    facts = read_script(target)
    _refuse_arguments(target, request, facts, training)
    processes = processes_of(config, training, surroundings)
    translation = translate(
        training,
        engine=processes.engine,
        topology=processes.topology,
        device=processes.device,
        options=config.engine.options(),
        origins=config.origins,
    )
    if not facts.uses_bigtrain:
        _refuse_untold(translation, config)
    name = config.name or target.stem
    going_on = resume(request.resume or "script", {}, surroundings.working_dir)
    started = _script_launching(processes, config, facts, translation, training)
    told = {f"cluster.env.{variable}": "for accelerate" for variable in started["environment"]}
    return RunPlan(
        name=name,
        kind="script",
        script_args=request.script_args,
        engine=translation.engine,
        options=foreign.merge(config.engine.options(), training),
        training=training,
        preload=preloading.for_script(processes.engine, facts.preload),
        origins={
            **told,
            **foreign.implied_origins(config.training, config.origins),
            **config.origins,
            **processes.origins,
            **_output_origin(config, facts),
        },
        **place(target, config.output_dir or f"runs/{name}", surroundings, resume=going_on),
        **started,
    )


def _refuse_arguments(
    target: Path, request: Request, facts: ScriptFacts, training: Mapping[str, Any]
) -> None:
    faults = secrecy.argument_faults(request.script_args)
    if facts.uses_bigtrain and training:
        faults.append(
            f"{target.name} uses bigtrain's Trainer, whose arguments say "
            f"{', '.join(sorted(training))}: give it to the script, after --"
        )
    if faults:
        raise ConfigError(faults)


def _refuse_untold(translation: Translation, config: ScriptConfig) -> None:
    options = foreign.merge(config.engine.options(), config.training)
    faults = [
        f"{config.origins.get(f'engine.{key}', 'the given config')}: engine.{key}: {why}"
        for key, why in accelerate_environment.faults(translation.engine, options)
    ]
    if faults:
        raise ConfigError(faults)


def _output_origin(config: ScriptConfig, facts: ScriptFacts) -> dict[str, str]:
    """What `output_dir` is for a script that doesn't ask the plan for it."""
    if config.output_dir is None or facts.uses_bigtrain:
        return {}
    said = config.origins["output_dir"]
    return {"output_dir": f"{said}: plan and logs; the script's own output goes where it says"}


def _script_launching(
    processes: Processes,
    config: ScriptConfig,
    facts: ScriptFacts,
    translation: Translation,
    training: Mapping[str, Any],
) -> dict[str, Any]:
    """As `launching`, with what accelerate reads where the script is not bigtrain's own kind."""
    fields = launching(processes, config.cluster, fresh_reason=facts.fresh_reason)
    if not facts.uses_bigtrain:
        told = accelerate_environment.variables(
            translation.engine, device=processes.device, training=training
        )
        fields["environment"] = {**told, **fields["environment"]}
    return fields
