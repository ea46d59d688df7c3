"""The batch script of a run: text from a template, nothing read, nothing run.

The template is plain bash with three comment lines that are replaced:

    # @options   the #SBATCH lines
    # @setup     modules, and the user's own preparations
    # @run       srun_options=(…), node_command=(…), max_requeues, record_dir and job
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from bigtrain.cluster.fork_server import interpreter_command
from bigtrain.errors import ConfigError
from bigtrain.plan import RunPlan
from bigtrain.slurm.options import is_container_option
from bigtrain.slurm.settings import SlurmSettings
from bigtrain.slurm.time_limit import signal_lead_s

NODE_MODULE = "bigtrain.slurm.node"
_PLACEHOLDERS = ("# @options", "# @setup", "# @run")
_ABOUT_JOB = "# One job of an array has the array's own number, which stands for all of them."
_ABOUT_COMMAND = (
    "# Python, with bigtrain's folder first on its module path instead of this directory."
)
# Options of ours that hold what the user said elsewhere.
_SAID_BY = {"job-name": "name", "output": "output_dir"}


@dataclass(frozen=True, kw_only=True)
class JobRequest:
    """One job: a run, or several of the same shape as an array."""

    plans: tuple[RunPlan, ...]
    plan_paths: tuple[Path, ...]
    """Where each plan lies when the job starts: absolute, readable from the nodes."""
    settings: SlurmSettings = field(default_factory=SlurmSettings)
    cpus_per_task: int | None = None
    """CPUs for all ranks of a node; an option of the user's wins."""
    package_root: str | None = None
    """The folder that holds the bigtrain to run, where that is not this very one."""
    last_save_s: float | None = None
    """How long this run's last checkpoint took to write, where there is one."""

    def __post_init__(self) -> None:
        shapes = {(plan.topology, plan.device) for plan in self.plans}
        if len(shapes) != 1 or len(self.plans) != len(self.plan_paths):
            raise ConfigError("the runs of a sweep must have the same nodes, processes and device")
        unlike = _unlike_options(self.plans)
        if unlike:
            raise ConfigError(
                f"{', '.join(f'cluster.slurm.{key}' for key in unlike)}: a sweep is one job array, "
                "whose jobs all have the same options; sweep something else, or submit twice"
            )

    @property
    def plan(self) -> RunPlan:
        return self.plans[0]

    @property
    def name(self) -> str:
        """Of the job; of a sweep, whose runs are named `run/value`, the part before."""
        return os.path.commonpath([plan.name for plan in self.plans]) or self.plan.name

    @property
    def log(self) -> Path:
        """Where the job's own output goes; `%j` (of an array: `%A_%a`) stands for its number."""
        if len(self.plans) == 1:
            return Path(self.plan.output_dir) / "slurm-%j.out"
        folder = os.path.commonpath([plan.output_dir for plan in self.plans])
        return Path(folder) / "slurm-%A_%a.out"


def render(request: JobRequest, *, template: str) -> str:
    """The batch script, whole. ConfigError where `template` lacks a placeholder."""
    lines = template.removesuffix("\n").split("\n")  # bash knows no other ends of lines
    missing = [name for name in _PLACEHOLDERS if lines.count(name) != 1]
    if missing:
        raise ConfigError(
            "the template of the batch script must have exactly one line "
            f"{' and one '.join(missing)}"
        )
    above = [line.strip() for line in lines[: lines.index("# @options")]]
    if any(line and not line.startswith("#") for line in above):
        raise ConfigError(
            "the template of the batch script has a command before # @options, and sbatch reads no "
            "options after the first one; move it below"
        )
    blocks = {
        "# @options": _option_lines(request),
        "# @setup": _setup_lines(request.settings),
        "# @run": _run_lines(request),
    }
    filled = [text for line in lines for text in blocks.get(line, [line])]
    return "\n".join(filled) + "\n"


def sbatch_options(request: JobRequest) -> dict[str, str | None]:
    """All options of the job, the user's after and above ours."""
    plan, settings = request.plan, request.settings
    options: dict[str, str | None] = {
        "job-name": request.name,
        "nodes": str(plan.topology.nodes + settings.spare_nodes),
        "ntasks-per-node": "1",
    }
    if settings.spare_nodes:
        options["no-kill"] = None
    if request.cpus_per_task is not None and "cpus-per-gpu" not in settings.options:
        options["cpus-per-task"] = str(request.cpus_per_task)
    options |= _gpu_options(request)
    if len(request.plans) > 1:
        options["array"] = f"0-{len(request.plans) - 1}"
    options |= {
        "output": _literal(request.log),
        "open-mode": "append",
        "requeue": None,
        "signal": f"USR2@{signal_lead_s(request.last_save_s, settings.options.get('time'))}",
        "export": "ALL",
    }
    said = {k: v for k, v in settings.options.items() if not is_container_option(k)}
    if "no-requeue" in said:
        del options["requeue"]
    if "requeue" in settings.left_out:  # which may be the cluster's own default
        options["no-requeue"] = None
    return {k: v for k, v in (options | said).items() if k not in settings.left_out}


def sbatch_flags(request: JobRequest) -> list[str]:
    """The job's options as they are typed: there they win over SBATCH_* variables of the user's,
    which themselves win over the lines of a script."""
    return [_option(name, value) for name, value in sbatch_options(request).items()]


def srun_options(request: JobRequest) -> dict[str, str | None]:
    """Options of the job's one step: a task on every node, which ends when one of them fails. With
    spare nodes it goes on then, and the tasks see to it themselves that they end together."""
    spare = request.settings.spare_nodes
    number = str(request.plan.topology.nodes + spare)
    options: dict[str, str | None] = {
        "nodes": number,
        "ntasks": number,
        "ntasks-per-node": "1",
        "distribution": "block",
    }
    cpus = sbatch_options(request).get("cpus-per-task")
    if cpus is not None:
        options["cpus-per-task"] = cpus  # since 22.05, srun does not take it from the job
    options |= {"kill-on-bad-exit": "0", "no-kill": None} if spare else {"kill-on-bad-exit": "1"}
    options |= {"export": "ALL", "mpi": "none", "input": "none"}
    said = {k: v for k, v in request.settings.options.items() if is_container_option(k)}
    return options | said


def node_command(request: JobRequest) -> list[str]:
    """What the task on every node runs. Of several plans it takes the one of its array index."""
    paths = [str(path) for path in request.plan_paths]
    settings = request.settings
    if settings.finds_bigtrain:
        return [settings.python or "python3", "-m", NODE_MODULE, *paths]
    _, flag, code, root, *rest = interpreter_command(NODE_MODULE, *paths)
    interpreter = settings.python or sys.executable
    return [interpreter, flag, code, request.package_root or root, *rest]


def _unlike_options(plans: Sequence[RunPlan]) -> list[str]:
    """Keys of `cluster.slurm` that do not say the same in all of them."""
    sections, first = [plan.slurm for plan in plans], plans[0].slurm
    keys = sorted({key for section in sections for key in section})
    return [k for k in keys if any(section.get(k) != first.get(k) for section in sections)]


def _gpu_options(request: JobRequest) -> dict[str, str | None]:
    settings, procs = request.settings, request.plan.topology.procs_per_node
    asked = settings.gpus_per_node
    if request.plan.device != "cuda" or "gpus-per-socket" in settings.options:
        return {}
    if asked is None:
        return {"gpus-per-node": str(procs)}
    if asked < procs:
        raise ConfigError(
            f"{procs} processes on each node need {procs} GPUs, and cluster.slurm asks for "
            f"{asked}; use --procs-per-node {asked}"
        )
    return {}


def _option_lines(request: JobRequest) -> list[str]:
    options = sbatch_options(request)
    torn = [k for k, v in options.items() if v is not None and not v.isprintable()]
    if torn:  # what follows a line break would be a command of the script
        raise ConfigError(
            [
                f"{_SAID_BY.get(k, f'cluster.slurm.{k}')}: {options[k]!r} can't be written in one "
                "line of a batch script; leave out what is no printable character"
                for k in torn
            ]
        )
    return [f"#SBATCH {_option(k, v, _quoted)}" for k, v in options.items()]


def _setup_lines(settings: SlurmSettings) -> list[str]:
    lines = [f"module load {shlex.quote(module)}" for module in settings.modules]
    return [*lines, *settings.setup.removesuffix("\n").split("\n")] if settings.setup else lines


def _run_lines(request: JobRequest) -> list[str]:
    return [
        f"max_requeues={request.settings.new_starts}",
        f"record_dir={shlex.quote(str(Path(request.plan.output_dir) / 'slurm'))}",
        *_job_lines(request),
        *_array("srun_options", [_option(k, v) for k, v in srun_options(request).items()]),
        *([] if request.settings.finds_bigtrain else [_ABOUT_COMMAND]),
        *_array("node_command", node_command(request)),
    ]


def _job_lines(request: JobRequest) -> list[str]:
    """The job's name for Slurm's commands. Not of the variables alone: what an array's job submits
    inherits them."""
    if len(request.plans) == 1:
        return ["job=$SLURM_JOB_ID"]
    return [_ABOUT_JOB, "job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"]


def _array(name: str, words: Sequence[str]) -> list[str]:
    return [f"{name}=(", *(f"  {shlex.quote(word)}" for word in words), ")"]


def _option(name: str, value: str | None, quote: Callable[[str], str] = str) -> str:
    return f"--{name}" if value is None else f"--{name}={quote(value)}"


def _quoted(value: str) -> str:
    """As sbatch reads a `#SBATCH` line: words end at blanks, quotes and backslashes count."""
    if all(c.isalnum() or c in "-_=+.,:/@%^~[]()*|&!" for c in value):
        return value
    escaped = value.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def _literal(path: Path) -> str:
    """A file name in which only the job's number is a pattern of Slurm's."""
    return f"{str(path.parent).replace('%', '%%')}/{path.name}"
