"""The command line: parse, call, print, exit code. Nothing is decided here.

Only this module catches `BigtrainError`: its message goes to stderr without a traceback. Whatever
takes long to import is imported inside the commands, so that `--help` answers at once.
"""

from __future__ import annotations

import gc
import os
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from bigtrain import run_commands
from bigtrain.arguments.values import did_you_mean
from bigtrain.checkpoint import consolidate_command, inspect_command
from bigtrain.cluster_flags import ClusterFlags, with_cluster_flags
from bigtrain.errors import BigtrainError, ConfigError
from bigtrain.faults import error_text, faults_told

if TYPE_CHECKING:
    from bigtrain.layers import Override

_WRONG_USE = 2
"""The exit code for a command line that can't be understood."""
_OBJECTS_UNTIL_COLLECTED = 50_000
"""Nearly all that imports make stays: looking for garbage all the time slows every command."""
_ENGINES = "auto, single, ddp, fsdp, zero1, zero2 or zero3"

app = typer.Typer(
    name="bigtrain",
    help="Train Hugging Face models on one process or many: a run file in, a model out.",
    epilog="bigtrain COMMAND --help shows each command's flags and examples.",
    no_args_is_help=True,
    suggest_commands=False,  # `main` names the nearest alone
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Target = Annotated[
    str, typer.Argument(metavar="TARGET", help="A run file (.yaml) or a training script (.py).")
]
ScriptArgs = Annotated[
    list[str] | None,
    typer.Argument(metavar="ARGS", help="A script's own arguments, after --."),
]
Engine = Annotated[
    str | None, typer.Option("--engine", metavar="NAME", help=f"The engine: {_ENGINES}.")
]


def _whole(text: str) -> int:
    if not text.strip().lstrip("+-").isdecimal():
        raise typer.BadParameter(f"{text!r} is not a whole number")
    return int(text)


Nodes = Annotated[
    int | None,
    typer.Option("--nodes", metavar="N", parser=_whole, help="Machines. Default: 1."),
]
ProcsPerNode = Annotated[
    int | None,
    typer.Option(
        "--procs-per-node",
        metavar="N",
        parser=_whole,
        help="Processes. Default: one per GPU, else 1.",
    ),
]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="SECTION.KEY=VALUE", help="A value that wins over the run file's. Repeat."
    ),
]
OutputDir = Annotated[
    str | None,
    typer.Option(
        "--output-dir",
        metavar="DIR",
        help="Default: runs/<name>. Of a script without bigtrain's Trainer: plan and logs alone.",
    ),
]
Env = Annotated[
    list[str] | None,
    typer.Option("--env", metavar="NAME=VALUE", help="A variable for the processes. Repeat."),
]
DeepSpeedJson = Annotated[
    str | None,
    typer.Option("--deepspeed", metavar="FILE", help="A DeepSpeed JSON to follow."),
]
AccelerateConfig = Annotated[
    str | None,
    typer.Option("--accelerate-config", metavar="FILE", help="An accelerate config to follow."),
]
DeviceMemory = Annotated[
    str | None,
    typer.Option("--device-memory", metavar="SIZE", help="Plan for GPUs of this size, as 80GiB."),
]
All = Annotated[bool, typer.Option("--all", help="Show arguments at their defaults too.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]


def main() -> NoReturn:
    """Run the command line and leave with its exit code."""
    gc.set_threshold(_OBJECTS_UNTIL_COLLECTED)
    try:
        sys.exit(app(prog_name="bigtrain"))
    except SystemExit as end:
        if end.code == _WRONG_USE and (hint := _hint(sys.argv[1:])):
            typer.echo(hint, err=True)
        raise
    except KeyboardInterrupt:  # before the command began
        sys.exit(consolidate_command.INTERRUPTED)
    except BigtrainError as error:
        typer.echo(error_text(error), err=True)
        sys.exit(error.exit_code)


def _hint(words: list[str]) -> str | None:
    """What was probably meant by a command line that can't be understood."""
    commands = app.registered_commands
    names = [each.callback.__name__ for each in commands if each.callback is not None]
    if words and words[0][0:1] != "-" and words[0] not in names:
        return did_you_mean(words[0], names).removeprefix("; ").capitalize() or None
    return _script_arguments_hint(words)


def _script_arguments_hint(words: list[str]) -> str | None:
    """For `launch train.py --lr 1`: what is the script's has to be told apart."""
    script = next((k for k, word in enumerate(words) if word.endswith(".py")), None)
    if words[:1] not in (["launch"], ["plan"]) or script is None or "--" in words:
        return None
    return (
        "A script's own arguments come after bigtrain's and --, as in: "
        f"bigtrain {words[0]} {shlex.quote(words[script])} --procs-per-node 2 -- --lr 1e-4"
    )


def _print_version(asked: bool) -> None:
    if asked:
        from bigtrain import __version__

        typer.echo(f"bigtrain {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the version.", callback=_print_version, is_eager=True
        ),
    ] = False,
) -> None:
    """Options of `bigtrain` itself."""


@app.command(
    epilog="\b\nExamples:\n"
    "  bigtrain launch configs/quickstart.yaml --procs-per-node 2\n"
    "  bigtrain launch run.yaml --engine zero3 --set training.max_steps=100\n"
    "  bigtrain launch train.py --procs-per-node 4 -- --learning-rate 1e-4\n"
    "  bigtrain launch run.yaml --slurm --nodes 4 --procs-per-node 8 --time 24:00:00"
)
@with_cluster_flags
def launch(
    target: Target,
    script_args: ScriptArgs = None,
    engine: Engine = None,
    procs_per_node: ProcsPerNode = None,
    set_: Set = None,
    output_dir: OutputDir = None,
    resume: Annotated[
        str | None,
        typer.Option(
            "--resume",
            metavar="auto|never|PATH",
            help="Where to go on. Default: auto; for a script, as it says itself.",
        ),
    ] = None,
    max_restarts: Annotated[
        int | None,
        typer.Option(
            "--max-restarts", metavar="N", parser=_whole, help="Starts anew after a failure."
        ),
    ] = None,
    on_save_failure: Annotated[
        str | None,
        typer.Option(
            "--on-save-failure",
            metavar="stop|continue",
            help="When a checkpoint can't be saved. Default: stop.",
        ),
    ] = None,
    env: Env = None,
    start: Annotated[
        str | None,
        typer.Option(
            "--start",
            metavar="fork|fresh",
            help="One import for all processes, or an interpreter each.",
        ),
    ] = None,
    deepspeed: DeepSpeedJson = None,
    accelerate_config: AccelerateConfig = None,
    device_memory: DeviceMemory = None,
    no_memory_check: Annotated[
        bool,
        typer.Option("--no-memory-check", help="Start a run that the plan says is too large."),
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the plan and the commands; start nothing.")
    ] = False,
    shows_all: All = False,
    as_json: AsJson = False,
    *,
    where: ClusterFlags,
) -> None:
    """Train: a run file, or a script of your own.

    On this machine, on several, or as a Slurm job.
    """
    flags = {
        "engine.name": ("--engine", engine),
        "cluster.procs_per_node": ("--procs-per-node", procs_per_node),
        "output_dir": ("--output-dir", output_dir),
        "cluster.max_restarts": ("--max-restarts", max_restarts),
        "cluster.start": ("--start", start),
        "training.on_save_failure": ("--on-save-failure", on_save_failure),
        "training.deepspeed": ("--deepspeed", deepspeed),
    }
    with faults_told(as_json=as_json):
        from bigtrain.launch_command import Launch, run
        from bigtrain.planning import Request
        from bigtrain.planning.forecast import read_bytes

        request = Request(
            target=target,
            script_args=tuple(script_args or ()),
            overrides=_overrides(set_, env, flags),
            resume=resume,
            accelerate_config=accelerate_config,
        )
        exit_code = run(
            Launch(
                request=request,
                where=where,
                environment=os.environ,
                working_dir=Path.cwd(),
                dry_run=dry_run,
                shows_all=shows_all,
                as_json=as_json,
                checks_memory=not no_memory_check,
                device_memory=read_bytes(device_memory, label="--device-memory"),
            )
        )
    raise typer.Exit(exit_code)


@app.command(
    epilog="\b\nExamples:\n"
    "  bigtrain plan configs/quickstart.yaml\n"
    "  bigtrain plan run.yaml --nodes 4 --procs-per-node 8 --device-memory 80GiB --compare\n"
    "  bigtrain plan run.yaml --diff runs/last-week\n"
    "  bigtrain plan train.py --engine zero3 -- --learning_rate 1e-4"
)
def plan(
    target: Target,
    script_args: ScriptArgs = None,
    engine: Engine = None,
    nodes: Nodes = None,
    procs_per_node: ProcsPerNode = None,
    device_memory: DeviceMemory = None,
    compare: Annotated[
        bool, typer.Option("--compare", help="Show the memory of all engines side by side.")
    ] = False,
    trace: Annotated[
        bool,
        typer.Option("--trace", help="Measure activations with the real model on fake tensors."),
    ] = False,
    diff: Annotated[
        str | None,
        typer.Option(
            "--diff", metavar="OTHER", help="What differs from a run file, a plan or a past run."
        ),
    ] = None,
    set_: Set = None,
    output_dir: OutputDir = None,
    deepspeed: DeepSpeedJson = None,
    accelerate_config: AccelerateConfig = None,
    shows_all: All = False,
    as_json: AsJson = False,
) -> None:
    """Show what would run, and whether it fits.

    Every value with its origin, what becomes of it, and the memory and disk that it needs.
    """
    from bigtrain import plan_command

    flags = {
        "engine.name": ("--engine", engine),
        "cluster.nodes": ("--nodes", nodes),
        "cluster.procs_per_node": ("--procs-per-node", procs_per_node),
        "output_dir": ("--output-dir", output_dir),
        "training.deepspeed": ("--deepspeed", deepspeed),
    }
    with faults_told(as_json=as_json):
        question = plan_command.Question(
            target=target,
            script_args=tuple(script_args or ()),
            overrides=_overrides(set_, None, flags),
            accelerate_config=accelerate_config,
            device_memory=device_memory,
            traces=trace,
            shows_all=shows_all,
            environment=os.environ,
            working_dir=Path.cwd(),
        )
        typer.echo(plan_command.answer(question, compares=compare, other=diff, as_json=as_json))


app.command(epilog=consolidate_command.EXAMPLES)(consolidate_command.consolidate)
app.command(epilog=inspect_command.EXAMPLES)(inspect_command.inspect)
run_commands.register(app)


def _overrides(
    assignments: list[str] | None,
    variables: list[str] | None,
    flags: Mapping[str, tuple[str, str | int | None]],
) -> tuple[Override, ...]:
    """`--set` and flags as one list, flags last so that they win."""
    from bigtrain.layers import Override, parse_assignment

    found = [parse_assignment(text) for text in assignments or ()]
    found += [
        Override(key=key, value=value, origin=f"flag {flag}")
        for key, (flag, value) in flags.items()
        if value is not None
    ]
    for text in variables or ():
        name, separator, value = text.partition("=")
        if not separator:
            raise ConfigError(f"--env {text}: write NAME=VALUE")
        found.append(Override(key=f"cluster.env.{name}", value=value, origin="flag --env"))
    return tuple(found)


if __name__ == "__main__":
    main()
