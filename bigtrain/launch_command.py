"""`bigtrain launch`: where a run takes place, and its start there.

--slurm                              a job is submitted, and the command comes back
a task of srun's, one per node       this node's share of a run over the step's nodes
a task of srun's, one per rank       this rank
--node-rank K --rdzv-endpoint …      this machine's share, started by hand on each
--nodes 2:4 --rdzv-endpoint …        the same, with as many machines as there are: torchrun
else                                 this machine alone
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import platform
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import typer

from bigtrain import memory_check
from bigtrain.cluster import environment as rank_environment
from bigtrain.cluster import local, nodes
from bigtrain.cluster.rendezvous import RefusedError, Seat
from bigtrain.cluster.rendezvous_address import interface_towards, is_own
from bigtrain.cluster.time_limit import TimeLimit
from bigtrain.cluster_flags import ClusterFlags
from bigtrain.console import open_console
from bigtrain.errors import BigtrainError, ConfigError, LaunchError, UnsupportedError
from bigtrain.layers import Override
from bigtrain.plan import RunPlan, write_plan
from bigtrain.plan_command import forecast_there, plan_as_json
from bigtrain.plan_report import report
from bigtrain.planning import Request, Surroundings, make_plan
from bigtrain.planning.device_memory import DeviceMemory, rank_memory
from bigtrain.planning.output_dir import begun_anew, check_not_in_use, plan_path
from bigtrain.planning.writable import check_cache
from bigtrain.sections import ClusterSection
from bigtrain.slurm import identity, time_limit
from bigtrain.slurm.progress import Progress

_RUN_FILES = (".yaml", ".yml")
# torch warns of every peer whose address has no name.
_QUIET = {"TORCH_CPP_LOG_LEVEL": "ERROR"}
_ELASTIC_RESTARTS = 3
"""How often the ranks start anew when machines come or go, unless --max-restarts says."""


@dataclass(frozen=True, kw_only=True)
class Launch:
    """What was asked for, and by whom."""

    request: Request
    where: ClusterFlags
    environment: Mapping[str, str]
    working_dir: Path
    dry_run: bool = False
    shows_all: bool = False
    """A dry run shows arguments at their defaults, too."""
    as_json: bool = False
    checks_memory: bool = True
    """A run that can't fit is refused."""
    device_memory: int | None = None
    """Bytes of each rank's device, where that was said."""

    def plan(
        self,
        *more: Override,
        gpus_of_nodes: Callable[[ClusterSection], int] | None = None,
        memory_of: Callable[[RunPlan], DeviceMemory] | None = None,
    ) -> RunPlan:
        """The plan with `more` said on top. `gpus_of_nodes`: it runs on nodes that Slurm will give,
        with as many GPUs each, and with memory as `memory_of` says."""
        said = (*self.request.overrides, *self.where.overrides(), *more)
        surroundings = Surroundings(
            environment=self.environment,
            working_dir=self.working_dir,
            gpus_of_nodes=gpus_of_nodes,
            memory_of=memory_of or self.memory_here,
        )
        return make_plan(dataclasses.replace(self.request, overrides=said), surroundings)

    def memory_here(self, plan: RunPlan) -> DeviceMemory:
        """What each rank of the plan has on machines like this one."""
        return rank_memory(
            plan.device,
            procs_per_node=plan.topology.procs_per_node,
            said=self.device_memory,
            environment=self.environment,
        )

    def nodes(self) -> tuple[Override, ...]:
        """`--nodes`, where it was given."""
        number = self.where.number_of_nodes()
        return () if number is None else (_nodes(number, "flag --nodes"),)


def run(launch: Launch) -> int:
    """Start the run, or show what would start; the exit code."""
    where, environment = launch.where, launch.environment
    tasks = identity.tasks_of_step(environment)
    if where.slurm:
        from bigtrain import submit_command

        return submit_command.run(launch)
    where.refuse_slurms()
    if where.nodes is not None and ":" in where.nodes:
        return _elastic(launch)
    if where.node_rank is not None or where.rdzv_endpoint is not None:
        return _on_this_machine_of_several(launch)
    if tasks > 1 and identity.is_task_per_node(environment):
        return _on_this_node_of_step(launch)
    if tasks > 1:
        return _as_rank_of_step(launch)
    return _here(launch)


# This machine alone


def _here(launch: Launch) -> int:
    made = _resumed(launch.plan(*launch.nodes()), launch.environment)
    check_cache(made)
    if launch.dry_run:
        return _show(made, [*local.describe(made), *_on_each_node(made, launch)], launch)
    path = plan_path(made)
    if made.topology.nodes > 1:
        raise UnsupportedError(_how_to_use_nodes(made.topology.nodes, launch))
    _require_fit(made, launch, *launch.nodes())
    check_not_in_use(made)
    write_plan(made, path)
    console = open_console(as_json=launch.as_json)
    why = made.origins.get("engine.name", "")
    console.say(f"engine {made.engine.name}{f' ({why})' if 'auto' in why else ''}, plan {path}")
    return local.launch(made, path, console=console, read_limit=_limit_of_job(launch.environment))


def _require_fit(made: RunPlan, launch: Launch, *nodes: Override) -> None:
    """ConfigError where it can't fit on this machine, unless that is not to be looked at."""
    if launch.checks_memory:
        memory_check.require_fit(
            made,
            environment=launch.environment,
            memory_of=launch.memory_here,
            plan_with=lambda more: launch.plan(*nodes, more),
        )


def _show(plan: RunPlan, commands: Sequence[str], launch: Launch) -> int:
    found = forecast_there(plan, launch.environment, launch.memory_here(plan))
    if launch.as_json:
        typer.echo(json.dumps(plan_as_json(plan, found) | {"commands": list(commands)}, indent=2))
    else:
        told = report(plan, found, shows_all=launch.shows_all)
        typer.echo("\n".join((told, "", "Commands", *(f"  {line}" for line in commands))))
    return 0


def _on_each_node(plan: RunPlan, launch: Launch) -> list[str]:
    """The command of every node, where there are several: one line, however many they are."""
    number = plan.topology.nodes
    if number == 1:
        return []
    words = ["bigtrain", "launch", *_words(launch), "--nodes", str(number)]
    words += ["--node-rank", "K", "--rdzv-endpoint", "HOST:PORT"]
    if launch.request.script_args:
        words += ["--", *launch.request.script_args]
    return [
        f"on each of {number} nodes, K = 0 to {number - 1}, HOST the first: {shlex.join(words)}",
        "or one job of Slurm's: the same command with --slurm",
    ]


def _how_to_use_nodes(number: int, launch: Launch) -> str:
    if "SLURM_JOB_ID" in launch.environment:
        return (
            f"the run is for {number} nodes, and this is a shell on one of them; start it with "
            "srun --ntasks-per-node=1 bigtrain launch …"
        )
    return (
        f"the run is for {number} nodes, and this machine is one; add --slurm to submit it, or "
        "start it on each machine with --node-rank K --rdzv-endpoint HOST:PORT"
    )


# A share of a run over several machines


def _on_this_node_of_step(launch: Launch) -> int:
    number = identity.nodes_of_step(launch.environment)
    asked = launch.where.number_of_nodes()
    if asked not in (None, number):
        raise ConfigError(f"flag --nodes: {asked}, and this step of srun's has {number} nodes")
    seat = identity.read_seat(launch.environment)
    return _take_seat(launch, seat, _nodes(number, "srun"), of_job=True)


def _on_this_machine_of_several(launch: Launch) -> int:
    where = launch.where
    number, rank, endpoint = where.number_of_nodes(), where.node_rank, where.rdzv_endpoint
    if number is None or rank is None or endpoint is None:
        raise ConfigError(
            "--nodes N, --node-rank K and --rdzv-endpoint HOST:PORT go together: the same N and "
            "endpoint on each machine, K from 0 on, and HOST the machine of --node-rank 0"
        )
    host, port = _endpoint(endpoint)
    secret = launch.environment.get(identity.TOKEN_VARIABLE, "")
    seat = Seat(
        node_rank=rank,
        num_nodes=number,
        host=platform.node(),
        job=endpoint,
        token=hashlib.sha256(f"{endpoint} {secret}".encode()).digest(),
        head_names=(host,),
        port=port,
    )
    return _take_seat(launch, seat, _nodes(number, "flag --nodes"), of_job=False)


def _take_seat(launch: Launch, seat: Seat, number: Override, *, of_job: bool) -> int:
    """Every node plans for itself; when they meet, they find out whether they plan the same.

    `of_job`: a job of Slurm's has started it, and may start it again.
    """
    try:
        made = launch.plan(number)
        if not launch.dry_run:
            _require_fit(made, launch, number)
    except BigtrainError as error:
        if seat.node_rank == 0:
            raise
        raise LaunchError(f"{seat.host}: {error}") from None
    environment = launch.environment
    if of_job:
        made = _resumed(made, environment)
    if launch.dry_run:
        return _show(made, local.describe(made, node_rank=seat.node_rank), launch)
    seat = dataclasses.replace(
        seat, interface=made.interface, deadline_s=float(made.join_timeout_s)
    )
    console = open_console(as_json=launch.as_json)
    try:
        return nodes.launch(
            made,
            plan_path(made),
            seat=seat,
            console=console,
            inherited=environment,
            record=Progress(made, environment=environment).judge if of_job else nodes.as_it_is,
            read_limit=_limit_of_job(environment) if of_job else None,
        )
    except RefusedError as error:
        return error.exit_code  # the first node has said why


def _resumed(plan: RunPlan, environment: Mapping[str, str]) -> RunPlan:
    """The plan of a job's new start: it goes on from where the one before has saved."""
    if identity.restart_count(environment) == 0:
        return plan
    since = begun_anew(Path(plan.output_dir), resume="auto")
    return dataclasses.replace(plan, resume="auto", begun_anew=since)


def _limit_of_job(environment: Mapping[str, str]) -> Callable[[], TimeLimit | None] | None:
    """What tells the time limit of the job around this process; None where there is no job."""
    in_job = "SLURM_JOB_ID" in environment
    return functools.partial(time_limit.of_job, environment) if in_job else None


def _endpoint(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    is_host = host and not set(host) & set("/@ ")  # which a URL has
    if not is_host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise ConfigError(f"flag --rdzv-endpoint: {text!r} is not HOST:PORT, as in node1:29400")
    return host.strip("[]"), int(port)


# Another launcher's ranks


def _as_rank_of_step(launch: Launch) -> int:
    """This very process becomes the rank: Slurm's variables say which one."""
    _refuse_script(launch, "start one task per node (srun --ntasks-per-node=1), which forks them")
    command = [sys.executable, "-m", "bigtrain.worker", *_words(launch)]
    if launch.dry_run:
        return _show(launch.plan(*_of_step(launch)), [shlex.join(command)], launch)
    return _become(command, {**_QUIET, **launch.environment})


def _of_step(launch: Launch) -> list[Override]:
    """The nodes and ranks that srun started."""
    tasks = identity.tasks_of_step(launch.environment)
    number = identity.nodes_of_step(launch.environment)
    procs = Override(key="cluster.procs_per_node", value=tasks // number, origin="srun")
    return [_nodes(number, "srun"), procs]


def _elastic(launch: Launch) -> int:
    """torch elastic's own agent: it negotiates who takes part, and starts the ranks anew when
    machines come or go."""
    where = launch.where
    if where.rdzv_endpoint is None or where.node_rank is not None:
        raise ConfigError(
            f"flag --nodes {where.nodes}: an elastic run needs --rdzv-endpoint HOST:PORT, the same "
            "on every machine, and no --node-rank: ranks are given out as machines come"
        )
    low, _, high = str(where.nodes).partition(":")
    if not (low.isdecimal() and high.isdecimal() and 1 <= int(low) <= int(high)):
        raise ConfigError(f"flag --nodes: {where.nodes!r} is not a range of numbers, as in 2:4")
    _refuse_script(launch, "use torchrun itself for a script of your own")
    host, _ = _endpoint(where.rdzv_endpoint)
    made = launch.plan(_nodes(int(low), "flag --nodes"))
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--nnodes", str(where.nodes)),
        *("--nproc-per-node", str(made.topology.procs_per_node)),
        *("--rdzv-backend", "c10d", "--rdzv-endpoint", where.rdzv_endpoint),
        # torch goes by the host name, which need not lead to the address of the endpoint.
        *("--rdzv-conf", f"is_host={int(is_own(host))}"),
        *("--rdzv-id", made.name, "--max-restarts", str(made.max_restarts or _ELASTIC_RESTARTS)),
        *("-m", "bigtrain.worker", *_words(launch)),
    ]
    if launch.dry_run:
        return _show(made, [shlex.join(command)], launch)
    said = {**launch.environment, **made.environment}
    return _become(
        command,
        {
            **_QUIET,
            **rank_environment.for_node(made, inherited=launch.environment),
            **nodes.ways_through(interface_towards(host), said=said),
        },
    )


def _refuse_script(launch: Launch, advice: str) -> None:
    if Path(launch.request.target).suffix not in _RUN_FILES:
        raise UnsupportedError(f"{launch.request.target} is a script; {advice}")
    if launch.request.accelerate_config is not None:
        raise UnsupportedError(
            "flag --accelerate-config: not where another launcher starts the ranks; say the same "
            "in the run file"
        )


def _words(launch: Launch) -> list[str]:
    """The worker's arguments: all that was said, as `--set`."""
    said = (*launch.request.overrides, *launch.where.overrides())
    words = [launch.request.target]
    for override in said:
        words += ["--set", f"{override.key}={json.dumps(override.value)}"]
    return words + (["--resume", launch.request.resume] if launch.request.resume else [])


def _become(command: Sequence[str], environment: Mapping[str, str]) -> NoReturn:
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(command[0], list(command), dict(environment))


def _nodes(number: int, origin: str) -> Override:
    return Override(key="cluster.nodes", value=number, origin=origin)
