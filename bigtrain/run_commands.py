"""`bigtrain jobs`, `bigtrain cancel` and `bigtrain logs`: runs that were started before."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from bigtrain.cluster.run_logs import Source

from bigtrain.errors import ConfigError, LaunchError
from bigtrain.faults import faults_told
from bigtrain.paths import expand_home

_POLL_S = 0.5
_LIST_S = 5.0
"""How often a followed run is looked through for logs that are new."""
_LOOKS_PER_S = 1000
"""At most as many files are looked at: they may lie on a disk that thousands share."""

Run = Annotated[
    str,
    typer.Argument(metavar="RUN", help="A job's number, a run's name, or its output_dir."),
]


def register(app: typer.Typer) -> None:
    """Add the commands to bigtrain's own."""
    app.command()(jobs)
    app.command()(cancel)
    app.command(
        epilog="\b\nExamples:\n"
        "  bigtrain logs runs/quickstart --rank 3\n"
        "  bigtrain logs 4711 --node node2 --grep error --since 10m --follow"
    )(logs)


def jobs(
    ended: Annotated[bool, typer.Option("--ended", help="Also those that have ended.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")] = False,
) -> None:
    """List your Slurm jobs: state, last step, where they run."""
    from bigtrain.slurm.jobs import list_jobs

    with faults_told(as_json=as_json):
        found = list_jobs(environment=os.environ, ended=ended)
    if as_json:
        typer.echo(json.dumps([dataclasses.asdict(job) for job in found], indent=2))
        return
    if not found:
        typer.echo("no jobs" if ended else "no jobs in the queue (--ended: those of the past)")
        return
    rows = [("JOB", "NAME", "STATE", "STEP", "ELAPSED", "NODES", "OUTPUT")]
    for job in found:
        state = f"{job.state} ({job.reason})" if job.reason else job.state
        step = "-" if job.last_step is None else str(job.last_step)
        rows.append(
            (job.job_id, job.name, state, step, job.elapsed, str(job.nodes), job.output_dir)
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        typer.echo("  ".join(cells).rstrip())


def cancel(run: Run) -> None:
    """End a Slurm job for good; its ranks save first."""
    from bigtrain.slurm import jobs as slurm_jobs

    typer.echo(f"job {slurm_jobs.cancel(run, environment=os.environ)} is told to end")


def logs(
    run: Run,
    rank: Annotated[
        list[int] | None, typer.Option("--rank", metavar="K", help="Of this rank. Repeat.")
    ] = None,
    node: Annotated[
        list[str] | None,
        typer.Option("--node", metavar="HOST|K", help="Of this node. Repeat."),
    ] = None,
    grep: Annotated[
        str | None, typer.Option("--grep", metavar="PATTERN", help="Lines that match.")
    ] = None,
    since: Annotated[
        str | None,
        typer.Option(
            "--since",
            metavar="10m|TIME",
            help="Lines from then on: 10m, 2h, 1d, or a time as 2026-01-31T12:00.",
        ),
    ] = None,
    attempt: Annotated[
        int | None, typer.Option("--attempt", metavar="N", help="Default: the newest.")
    ] = None,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Go on as the logs grow; Ctrl-C ends it.")
    ] = False,
) -> None:
    """Show the logs of all ranks as one.

    In the order of time, with node and rank before each line.
    """
    from bigtrain.cluster.run_logs import read_since

    start = 0.0 if since is None else read_since(since, now=time.time())
    try:
        pattern = re.compile(grep or "")
    except re.error as error:
        raise ConfigError(f"flag --grep: {grep!r} is no regular expression: {error}") from None
    place = _output_dir(run)
    if not (place / "logs").is_dir() and (found := _attempt_of_script(place)):
        place, attempt = found[0], found[1] if attempt is None else attempt
    lines = _lines(place, attempt, ranks=rank or [], nodes=node or [], start=start, follow=follow)
    try:
        for _, label, text in lines:
            if pattern.search(text):
                typer.echo(f"[{label}] {text}")
    except (KeyboardInterrupt, BrokenPipeError):
        os._exit(0)  # whoever reads has seen enough; nothing is left to be written


def _output_dir(run: str) -> Path:
    """Of a directory, a run file, the name of a run that has no output_dir of its own, or a job."""
    for place in (Path(run), Path("runs") / run):
        if (place / "logs").is_dir():
            return place
    if Path(run).suffix in (".yaml", ".yml") and Path(run).is_file():
        return _output_dir_of_file(Path(run))
    if Path(run).suffix == ".py" and Path(run).is_file():
        return Path("runs") / Path(run).stem
    if Path(run).is_dir() and _attempt_of_script(Path(run)):
        return Path(run)
    from bigtrain.slurm.jobs import find_jobs

    try:
        found = find_jobs(run, environment=os.environ)[0].runs  # the newest
    except LaunchError:
        raise ConfigError(
            f"{run} is neither a run file, nor a script, nor a run's output directory (it has no "
            "logs), nor a name below runs/, nor a job or run that bigtrain submitted; a script's "
            "logs are in the --output-dir of its launch, else in runs/ under its name"
        ) from None
    if len(found) > 1:
        named = ", ".join(f"{run.job_id} ({run.name})" for run in found)
        raise ConfigError(f"{run} is a sweep; say which of its runs: {named}")
    return Path(found[0].output_dir)


def _attempt_of_script(directory: Path) -> tuple[Path, int] | None:
    """Where below runs/ the logs of a script are that itself writes to `directory`, as its
    `--output_dir` says: the output directory of its launch, and the newest such attempt."""
    from bigtrain.plan import read_plan

    paths = sorted(Path("runs").glob("*/plans/attempt-*.json"), key=_changed, reverse=True)
    for path in paths:
        try:
            plan = read_plan(path)
        except ConfigError:
            continue
        own = _said_output_dir(plan.script_args)
        if own is not None and os.path.realpath(Path(plan.working_dir, own)) == os.path.realpath(
            directory
        ):
            return path.parents[1], plan.attempt
    return None


def _changed(path: Path) -> float:
    return path.stat().st_mtime


def _said_output_dir(words: Sequence[str]) -> str | None:
    """What a script's own arguments say of it, as argparse and HfArgumentParser take it."""
    for position, word in enumerate(words):
        name, is_joined, value = word.partition("=")
        if name in ("--output_dir", "--output-dir"):
            return value if is_joined else next(iter(words[position + 1 :]), None)
    return None


def _output_dir_of_file(path: Path) -> Path:
    from bigtrain.run_file import read_run_file

    values = read_run_file(path, label=str(path)).values
    training, name = values.get("training"), values.get("name") or path.stem
    below = training.get("output_dir") if isinstance(training, dict) else None
    return expand_home(
        str(values.get("output_dir") or below or f"runs/{name}"), label=f"{path}: output_dir"
    )


def _lines(
    place: Path,
    number: int | None,
    *,
    ranks: list[int],
    nodes: list[str],
    start: float,
    follow: bool,
) -> Iterator[tuple[float, str, str]]:
    """Time, label and text of every line from `start` on; with `follow` also of those to come."""
    from bigtrain.cluster.run_logs import Reader, merged

    readers: dict[Path, Reader] = {}
    listed = -_LIST_S
    while True:
        if time.monotonic() - listed >= _LIST_S:
            for source in _sources(place, number, ranks=ranks, nodes=nodes, follow=follow):
                if source.path not in readers:
                    readers[source.path] = Reader(source)
                    if start:
                        readers[source.path].skip_to(start)
            listed = time.monotonic()
        for line in merged(list(readers.values()), is_final=not follow):
            if line.time >= start:
                yield line.time, line.label, line.text
        if not follow:
            return
        time.sleep(_POLL_S + len(readers) / _LOOKS_PER_S)


def _sources(
    place: Path, number: int | None, *, ranks: list[int], nodes: list[str], follow: bool
) -> list[Source]:
    """The logs there are. ConfigError where there are none, unless they may come."""
    from bigtrain.cluster.run_logs import attempts, sources

    folders = attempts(place)
    chosen = [f for f in folders if number is None or f.name == f"attempt-{number:02d}"]
    if not chosen and not follow:
        there = ", ".join(folder.name for folder in folders) or "none"
        raise ConfigError(f"{place} has no logs of that attempt; there are {there}")
    found = sources(chosen[-1], ranks=ranks, nodes=nodes) if chosen else []
    if not found and not follow:
        raise ConfigError(f"{chosen[-1]} has no log of that rank or node; {_there(chosen[-1])}")
    return found


def _there(attempt: Path) -> str:
    """Whose logs there are: `there are ranks 0 to 7 on node1, node2`."""
    from bigtrain.cluster.run_logs import sources

    found = sources(attempt)
    ranks = sorted({source.rank for source in found if source.rank is not None})
    nodes = list(dict.fromkeys(source.node for source in found))
    if not ranks:
        return "there is none of any rank"
    is_row = len(ranks) > 2 and ranks[-1] - ranks[0] == len(ranks) - 1
    named = f"{ranks[0]} to {ranks[-1]}" if is_row else ", ".join(map(str, ranks))
    count = "are ranks" if len(ranks) > 1 else "is rank"
    more = " …" if len(nodes) > 8 else ""
    return f"there {count} {named} on {', '.join(nodes[:8])}{more}"
