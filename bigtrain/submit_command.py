"""`bigtrain launch --slurm`: the run, or a sweep of it, as a job in Slurm's queue."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

import typer

from bigtrain import memory_check, sweep
from bigtrain.errors import ConfigError
from bigtrain.job_memory import JobMemory
from bigtrain.plan import RunPlan
from bigtrain.plan_command import forecast_there, plan_as_json
from bigtrain.plan_report import report
from bigtrain.slurm import identity
from bigtrain.slurm.partition import Survey
from bigtrain.slurm.settings import read_settings
from bigtrain.slurm.submit import describe, gpus_of_nodes, submit

if TYPE_CHECKING:
    from bigtrain.launch_command import Launch


def run(launch: Launch) -> int:
    """Submit it, or show the script that would be submitted; the exit code."""
    if identity.tasks_of_step(launch.environment):
        raise ConfigError("flag --slurm: this is a task of a Slurm job already; leave it out")
    if launch.where.node_rank is not None or launch.where.rdzv_endpoint is not None:
        raise ConfigError("flag --slurm: Slurm knows the nodes; leave --node-rank and "
                          "--rdzv-endpoint out")  # fmt: skip
    survey = Survey()
    memory = JobMemory(launch.device_memory, survey=survey)
    plan = functools.partial(
        launch.plan,
        *launch.nodes(),
        gpus_of_nodes=functools.partial(gpus_of_nodes, survey=survey),
        memory_of=memory,
    )
    plans = sweep.plans(launch.where.sweep or (), plan)
    settings = read_settings(plans[0].slurm, origins=_origins_of_options(plans[0]))
    if launch.dry_run:
        script = describe(plans, settings=settings, survey=survey)
        return _show(plans, script, launch, memory=memory)
    for made in plans if launch.checks_memory else ():
        memory_check.require_fit(
            made, environment=launch.environment, memory_of=memory, plan_with=plan
        )
    taken = submit(plans, settings=settings, environment=launch.environment, survey=survey)
    if launch.as_json:
        told = {"kind": "submitted", "job_id": taken.job_id, "log": taken.log}
        typer.echo(json.dumps(told | ({"notes": list(taken.notes)} if taken.notes else {})))
    else:
        typer.echo(f"job {taken.job_id}, {_shape(plans)}\nlog {taken.log}")
        for note in taken.notes:
            typer.echo(f"note: {note}", err=True)
    return 0


def _show(plans: Sequence[RunPlan], script: str, launch: Launch, *, memory: JobMemory) -> int:
    """The script alone on stdout, as sbatch takes it; the plan (the first of a sweep) beside it."""
    plan = plans[0]
    found = forecast_there(plan, launch.environment, memory(plan))
    if launch.as_json:
        typer.echo(json.dumps(plan_as_json(plan, found) | {"script": script}, indent=2))
        return 0
    typer.echo(report(plan, found, shows_all=launch.shows_all) + "\n", err=True)
    typer.echo(script, nl=False)
    return 0


def _shape(plans: Sequence[RunPlan]) -> str:
    topology = plans[0].topology
    shape = f"{topology.nodes} × {topology.procs_per_node} ranks on {plans[0].device}"
    return f"an array of {len(plans)} runs, {shape} each" if len(plans) > 1 else shape


def _origins_of_options(plan: RunPlan) -> dict[str, str]:
    prefix = "cluster.slurm."
    found = plan.origins.items()
    return {key.removeprefix(prefix): said for key, said in found if key.startswith(prefix)}
