"""How long from srun to the first collective on several nodes, and how long a submission takes.

    python benchmarks/slurm_launch.py                     4 nodes × 1, 2 and 4 ranks
    python benchmarks/slurm_launch.py --submission        bigtrain launch --slurm against sbatch
    python benchmarks/slurm_launch.py --json              for programs

The nodes are those of the tests' Slurm cluster: network namespaces of this one machine, which
share its cores (root on Debian with Slurm's daemons). Every repeat starts each launcher once, in
turn; the median is shown, and its ratio to torchrun's. The script is the smallest there is: import
torch and transformers, join a gloo group, one all-reduce. A start's time is that of the last rank
to leave the all-reduce.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(_ROOT / "tests" / "slurm"))

from slurm_testbed import Testbed, missing, testbed  # noqa: E402

_BIN = Path(sys.executable).parent
_NODES = 4
_TIMEOUT_S = 180.0
_numbers = itertools.count()
"""Of starts: each has a folder and a port of its own."""
_SCRIPT = """\
import os
import time

import torch
import torch.distributed as dist
import transformers

dist.init_process_group("gloo")
dist.all_reduce(torch.ones(1))
now = time.time()
rank = dist.get_rank()
with open(os.path.join(os.environ["FIRST_COLLECTIVE"], f"rank-{rank}"), "w") as file:
    file.write(str(now))
dist.destroy_process_group()
"""
_RUN_FILE = """\
name: submitted
output_dir: {output_dir}
model:
  config: {{model_type: llama, hidden_size: 64, num_hidden_layers: 2}}
tokenizer: {{kind: bytes}}
data: {{name: builtin:python-docs, sequence_length: 128}}
engine: fsdp
cluster: {{nodes: 4, procs_per_node: 8, slurm: {{hold: true, gres: "gpu:2"}}}}
training: {{use_cpu: true}}
"""


def main() -> int:
    """Measure what was asked for, and print it."""
    options = _parse()
    reason = missing()
    if reason is not None:
        print(f"no Slurm cluster here: {reason}", file=sys.stderr)
        return 1
    with testbed(_NODES) as bed, tempfile.TemporaryDirectory() as folder:
        measure = _submissions if options.submission else _starts
        rows = measure(bed, Path(folder), options)
    if options.json:
        print(json.dumps({"cores": os.cpu_count(), "nodes": _NODES, "rows": rows}, indent=2))
    return 0


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4], metavar="N")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--submission", action="store_true")
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


def _starts(bed: Testbed, folder: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    script = folder / "first_collective.py"
    script.write_text(_SCRIPT)
    rows = []
    for ranks in options.ranks:
        commands = {
            "srun torchrun": lambda n, ranks=ranks: _torchrun(bed, script, ranks, n),
            "srun bigtrain": lambda n, ranks=ranks: _bigtrain(script, ranks, folder / f"out{n}"),
        }
        row = _in_turn(
            commands,
            repeats=options.repeats,
            measure=lambda command, n, ranks=ranks: _first_collective(
                bed, command, marks=folder / f"marks-{n}", world=_NODES * ranks
            ),
        )
        rows.append({"ranks_per_node": ranks, **row})
        if not options.json:
            _show(f"{_NODES} nodes × {ranks}", row, reference="srun torchrun")
    return rows


def _torchrun(bed: Testbed, script: Path, ranks: int, count: int) -> list[str]:
    return [
        *(str(_BIN / "torchrun"), "--nnodes", str(_NODES), "--nproc-per-node", str(ranks)),
        *("--rdzv-backend", "c10d", "--rdzv-endpoint", f"{bed.address(0)}:{29400 + count}"),
        *("--rdzv-id", f"run{count}", str(script)),
    ]


def _bigtrain(script: Path, ranks: int, output: Path) -> list[str]:
    return [
        *(str(_BIN / "bigtrain"), "launch", str(script), "--procs-per-node", str(ranks)),
        *("--output-dir", str(output)),
    ]


def _first_collective(bed: Testbed, command: Sequence[str], *, marks: Path, world: int) -> float:
    """Seconds from srun until the last rank has left the all-reduce."""
    marks.mkdir()
    nodes = (f"--nodes={_NODES}", f"--ntasks={_NODES}", "--ntasks-per-node=1", "--mpi=none")
    started = time.time()
    done = subprocess.run(
        ["srun", *nodes, *command],
        env={**os.environ, **bed.environment, "FIRST_COLLECTIVE": str(marks)},
        capture_output=True,
        text=True,
        timeout=_TIMEOUT_S,
        check=False,
    )
    times = [float(path.read_text()) for path in marks.iterdir()]
    if done.returncode != 0 or len(times) != world:
        raise SystemExit(f"{command} left with {done.returncode}:\n{done.stdout}{done.stderr}")
    return max(times) - started


def _submissions(bed: Testbed, folder: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    run_file = folder / "run.yaml"
    script = folder / "bare.sbatch"
    script.write_text("#!/bin/bash\n#SBATCH --nodes=4 --hold\ntrue\n")

    def bigtrain(count: int) -> list[str]:
        run_file.write_text(_RUN_FILE.format(output_dir=folder / f"out{count}"))
        return [str(_BIN / "bigtrain"), "launch", str(run_file), "--slurm"]

    row = _in_turn(
        {"sbatch": lambda _: ["sbatch", str(script)], "bigtrain launch --slurm": bigtrain},
        repeats=options.repeats,
        measure=lambda command, _: _seconds_of(bed, command, folder),
    )
    if not options.json:
        _show("submission", row, reference="sbatch")
    return [row]


def _seconds_of(bed: Testbed, command: Sequence[str], folder: Path) -> float:
    started = time.perf_counter()
    bed.run(*command, cwd=folder, environment={"XDG_STATE_HOME": str(folder / "state")})
    return time.perf_counter() - started


def _in_turn(
    commands: dict[str, Callable[[int], list[str]]],
    *,
    repeats: int,
    measure: Callable[[list[str], int], float],
) -> dict[str, Any]:
    """Name → its seconds, one of every repeat; the first start, which warms caches, is left out."""
    found: dict[str, list[float]] = {name: [] for name in commands}
    for repeat in range(repeats + 1):
        for name, command in commands.items():
            number = next(_numbers)
            seconds = measure(command(number), number)
            if repeat > 0:
                found[name].append(seconds)
    return {
        name: {"median_s": statistics.median(seconds), "seconds": seconds}
        for name, seconds in found.items()
    }


def _show(what: str, row: dict[str, Any], *, reference: str) -> None:
    base = row[reference]["median_s"]
    for name, times in row.items():
        median, least, most = times["median_s"], min(times["seconds"]), max(times["seconds"])
        ratio = f"{median / base:.2f}×" if name != reference else ""
        print(f"{what:14} {name:24} {median:7.3f} s ({least:.3f}-{most:.3f})  {ratio}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
