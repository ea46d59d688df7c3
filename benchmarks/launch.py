"""How long from the command to the first collective, and to the first optimizer step.

    python benchmarks/launch.py                        --help; first collective: 2, 4, 8 ranks
    python benchmarks/launch.py --steps fsdp zero3     first optimizer step of a run file
    python benchmarks/launch.py --json                 for programs

After one unmeasured start, every repeat starts each launcher once, in turn, so that a machine
that is busy for a while is busy for all of them. The median over repeats is shown, and its ratio
to torchrun's. The script that is launched is the smallest there is: import torch and
transformers, join a gloo group, one all-reduce. The first optimizer step is the moment at which
the run's first metrics are on disk.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[1]
_BIN = Path(sys.executable).parent
_TIMEOUT_S = 300.0
_SCRIPT = """\
import os
import time

import torch
import torch.distributed as dist
import transformers

dist.init_process_group("gloo")
dist.all_reduce(torch.ones(1))
if dist.get_rank() == 0:
    with open(os.environ["FIRST_COLLECTIVE_FILE"], "w") as file:
        file.write(str(time.time()))
dist.destroy_process_group()
"""


@dataclass(frozen=True, kw_only=True)
class Contest:
    """One thing that several launchers are timed at."""

    name: str
    ranks: int
    commands: Mapping[str, Callable[[Path], Sequence[str]]]
    """Launcher → its command, given a folder of its own."""
    moment: Callable[[Path], float | None]
    """Seconds since the epoch at which the goal was reached, once it was."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """Medians, and all that was measured."""

    contest: str
    ranks: int
    launcher: str
    median_s: float
    ratio_to_torchrun: float
    seconds: tuple[float, ...]


def main() -> int:
    """Time what was asked for, and show it."""
    options = _parse()
    results: list[Result] = []
    with tempfile.TemporaryDirectory() as folder:
        for contest in _contests(options, Path(folder)):
            results += _compare(contest, repeats=options.repeats, folder=Path(folder))
            if not options.json:
                _show(results[-len(contest.commands) :])
    if options.json:
        print(json.dumps([asdict(result) for result in results], indent=2))
    return 0


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, nargs="+", metavar="N", help="default: 2 4 8, or 2 4")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--steps", nargs="+", metavar="ENGINE", help="time the first optimizer step on these"
    )
    parser.add_argument("--run-file", type=Path, default=_ROOT / "configs" / "quickstart.yaml")
    parser.add_argument("--without-accelerate", action="store_true")
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


def _contests(options: argparse.Namespace, folder: Path) -> list[Contest]:
    if options.steps:
        return [
            _first_step(engine, ranks, options.run_file)
            for engine in options.steps
            for ranks in options.ranks or (2, 4)
        ]
    script = folder / "first_collective.py"
    script.write_text(_SCRIPT)
    collectives = [
        _first_collective(ranks, script, with_accelerate=not options.without_accelerate)
        for ranks in options.ranks or (2, 4, 8)
    ]
    return [_help(), *collectives]


def _help() -> Contest:
    """No ranks: the time until `--help` has answered and left."""
    return Contest(
        name="--help",
        ranks=0,
        commands={
            "torchrun": lambda _: [sys.executable, "-m", "torch.distributed.run", "--help"],
            "bigtrain launch": lambda _: [sys.executable, "-m", "bigtrain", "--help"],
        },
        moment=_answered_time,
    )


def _first_collective(ranks: int, script: Path, *, with_accelerate: bool) -> Contest:
    commands = {
        "torchrun": lambda _: [*_torchrun(ranks), str(script)],
        "bigtrain launch": lambda folder: [*_bigtrain(ranks, folder), str(script)],
    }
    if with_accelerate:
        commands["accelerate launch"] = lambda _: [*_accelerate(ranks), str(script)]
    return Contest(name="first collective", ranks=ranks, commands=commands, moment=_written_time)


def _first_step(engine: str, ranks: int, run_file: Path) -> Contest:
    def settings(folder: Path) -> list[str]:
        values = (
            f"engine.name={engine}",
            f"output_dir={folder / 'run'}",
            "training.logging_steps=1",
            "training.max_steps=1",
            "training.eval_on_start=false",
        )
        return [part for value in values for part in ("--set", value)]

    return Contest(
        name=f"first step, {engine}",
        ranks=ranks,
        commands={
            "torchrun": lambda folder: [
                *_torchrun(ranks), "-m", "bigtrain.worker", str(run_file), *settings(folder),
            ],
            "bigtrain launch": lambda folder: [
                *_bigtrain(ranks, folder), str(run_file), *settings(folder),
            ],
        },
        moment=_first_metrics_time,
    )  # fmt: skip


def _torchrun(ranks: int) -> list[str]:
    return [
        sys.executable, "-m", "torch.distributed.run", "--standalone",
        f"--nproc-per-node={ranks}",
    ]  # fmt: skip


def _bigtrain(ranks: int, folder: Path) -> list[str]:
    return [
        sys.executable, "-m", "bigtrain", "launch", f"--procs-per-node={ranks}",
        f"--output-dir={folder / 'run'}",
    ]  # fmt: skip


def _accelerate(ranks: int) -> list[str]:
    return [
        str(_BIN / "accelerate"), "launch", "--multi_gpu", "--num_machines=1",
        f"--num_processes={ranks}", "--mixed_precision=no", "--dynamo_backend=no",
        "--main_process_port=0",
    ]  # fmt: skip


def _compare(contest: Contest, *, repeats: int, folder: Path) -> list[Result]:
    seconds: dict[str, list[float]] = {launcher: [] for launcher in contest.commands}
    # Once unmeasured: files come into the page cache, data into the run's own.
    own = Path(tempfile.mkdtemp(dir=folder))
    _time(contest.commands["torchrun"](own), own, contest.moment)
    for _ in range(repeats):
        for launcher, command in contest.commands.items():
            own = Path(tempfile.mkdtemp(dir=folder))
            seconds[launcher].append(_time(command(own), own, contest.moment))
    medians = {launcher: statistics.median(times) for launcher, times in seconds.items()}
    return [
        Result(
            contest=contest.name,
            ranks=contest.ranks,
            launcher=launcher,
            median_s=round(median, 3),
            ratio_to_torchrun=round(median / medians["torchrun"], 3),
            seconds=tuple(round(time_, 3) for time_ in seconds[launcher]),
        )
        for launcher, median in medians.items()
    ]


def _time(command: Sequence[str], folder: Path, moment: Callable[[Path], float | None]) -> float:
    """Seconds from starting `command` to the moment; the command has ended when this returns."""
    log = folder / "output.txt"
    with log.open("wb") as output:
        started = time.time()
        process = subprocess.Popen(
            command,
            cwd=folder,
            env=_environment(folder),
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            process.wait(timeout=_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    reached = moment(folder)
    if reached is None:
        tail = log.read_text(errors="replace")[-2000:]
        raise SystemExit(f"{' '.join(command)}\nexit code {process.returncode}\n{tail}")
    return reached - started


def _environment(folder: Path) -> dict[str, str]:
    path = os.pathsep.join([str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {
        **os.environ,
        "PYTHONPATH": path,
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "FIRST_COLLECTIVE_FILE": str(folder / "moment.txt"),
        # Without it a worker under torchrun writes no metrics; bigtrain launch sets its own.
        "BIGTRAIN_LOG_DIR": str(folder),
    }


def _answered_time(folder: Path) -> float | None:
    """Now, just after the command has left, if it showed its usage."""
    return time.time() if "usage" in (folder / "output.txt").read_text().lower() else None


def _written_time(folder: Path) -> float | None:
    path = folder / "moment.txt"
    return float(path.read_text()) if path.exists() else None


def _first_metrics_time(folder: Path) -> float | None:
    """When the record of the first optimizer step was written."""
    for path in folder.rglob("metrics.jsonl"):
        for record in map(json.loads, path.read_text().splitlines()):
            if record.get("step") == 1 and "loss" in record:
                return float(record["time"])
    return None


def _show(results: Sequence[Result]) -> None:
    for result in results:
        times = " ".join(f"{seconds:.2f}" for seconds in result.seconds)
        print(
            f"{result.contest:<18} {result.ranks} ranks  {result.launcher:<18}"
            f"{result.median_s:7.2f} s  {result.ratio_to_torchrun:5.2f}x  ({times})",
            flush=True,
        )


if __name__ == "__main__":
    sys.exit(main())
