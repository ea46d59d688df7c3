"""Consolidation against `cp` of the same bytes, and against the formats' own tools.

    python benchmarks/consolidate.py --size 1.3 --folder /fast/disk
    python benchmarks/consolidate.py --size 4 --limit-mb 512 --source zero3 --results all.json
    python benchmarks/consolidate.py --show all.json

Checkpoints of a Llama with that many GB of fp32 weights are made on the spot by 2 ranks: torch DCP
by torch (and as sharded safetensors, for torch's own consolidation), ZeRO-2 and ZeRO-3 by
`torch.save` of what DeepSpeed's engine saves (a real engine would need ten times the memory; the
moments, which nobody here reads, share the masters' bytes). Every repeat runs every tool once, in
turn, its source in the page cache and right after a `cp` as large; each is a process of its own,
timed from its start until its output is synced. Ours is the command, with the checks that it does
by itself. The process's memory is sampled: what it holds itself (anonymous), and its peak with the
pages of files. `--limit-mb` runs each tool once more in a memory cgroup (needs root and cgroup v1
or v2); `--only` leaves out the tools that haven't this in their name, `cp` aside. `--source` makes
and reads one kind of checkpoint; with `--results` several such calls add up in a file, which
`--show` makes a table of. "× cp" is the median, over the rounds, of a tool's time by that of the
round's `cp`.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TypeAlias

from sharded_checkpoints import llama_shapes, write_dcp, write_zero

_ROOT = Path(__file__).resolve().parents[1]
_SAMPLE_S = 0.02
_LONGEST_S = 120.0
"""Then a tool is ended: under a limit some do nothing but read the same pages again."""
_OURS = [sys.executable, "-m", "bigtrain", "consolidate", "{source}", "{output}"]
_COPY = ["cp", "{reference}", "{output}"]
_ZERO_TO_FP32 = [
    sys.executable,
    "-m",
    "deepspeed.utils.zero_to_fp32",
    "{source}",
    "{output}",
    "--safe_serialization",
    "--max_shard_size",
    "5GB",
]
_DCP_TO_TORCH = [
    sys.executable,
    "-m",
    "torch.distributed.checkpoint.format_utils",
    "dcp_to_torch",
    "{source}",
    "{output}",
]
_MERGE_WEIGHTS = [
    sys.executable,
    "-m",
    "accelerate.commands.accelerate_cli",
    "merge-weights",
    "{source}",
    "{output}",
]
_SOURCES = ("zero2", "zero3", "dcp")
_CP = "cp of the output"
_OURS_FP32 = "bigtrain consolidate"
_OURS_BF16 = "bigtrain --dtype bf16"
_TORCH_SAFETENSORS = """\
import json, sys
from torch.distributed.checkpoint._consolidate_hf_safetensors import consolidate_safetensors_files
names = json.load(open(sys.argv[1] + "/names.json"))
consolidate_safetensors_files(sys.argv[1], sys.argv[2], dict.fromkeys(names, 1))
"""


@dataclass(frozen=True, kw_only=True)
class Tool:
    """One way of making one file of a checkpoint."""

    name: str
    source: str
    command: Sequence[str]
    makes_output_dir: bool = True


@dataclass(frozen=True, kw_only=True)
class Run:
    """One process, to its end and the sync of what it wrote."""

    seconds: float
    anonymous_mb: float
    peak_mb: float
    cp_seconds: float = math.nan
    """Of `cp` of as many bytes, right before."""
    outcome: str = "ok"


@dataclass(kw_only=True)
class Kept:
    """All runs of a tool."""

    runs: list[Run] = field(default_factory=list)
    limited: list[Run] = field(default_factory=list)
    """With little memory."""


Results: TypeAlias = dict[str, Kept]


def tools() -> list[Tool]:
    """Ours and the peers, for every kind of checkpoint."""
    torch_tool = [sys.executable, "-c", _TORCH_SAFETENSORS, "{source}", "{output}"]
    found = [
        Tool(name=_CP, source="fp32", command=_COPY),
        Tool(name=_CP, source="bf16", command=_COPY),
        Tool(name="zero_to_fp32", source="zero2", command=_ZERO_TO_FP32),
        Tool(name="zero_to_fp32", source="zero3", command=_ZERO_TO_FP32),
        Tool(name="dcp_to_torch_save", source="dcp", command=_DCP_TO_TORCH),
        Tool(name="accelerate merge-weights", source="dcp", command=_MERGE_WEIGHTS),
        Tool(
            name="torch's consolidation",
            source="hf",
            command=torch_tool,
            makes_output_dir=False,
        ),
    ]
    ours = [Tool(name=_OURS_FP32, source=source, command=_OURS) for source in _SOURCES]
    bf16 = [*_OURS, "--dtype", "bf16"]
    ours += [Tool(name=_OURS_BF16, source=source, command=bf16) for source in _SOURCES]
    return found[:2] + ours + found[2:]


def run(tool: Tool, folder: Path, *, cgroup: Path | None = None) -> Run:
    """Run it once; its output is removed again."""
    output = folder / "output"
    reference = folder / f"reference-{tool.source}"
    places = {"source": folder / tool.source, "output": output, "reference": reference}
    if not tool.makes_output_dir:
        output.mkdir()
    command = [part.format(**places) for part in tool.command]
    _warm(reference if tool.name == _CP else folder / tool.source)
    _prime(folder / "reference-fp32")
    environment = {**os.environ, "PYTHONPATH": str(_ROOT), "DS_ACCELERATOR": "cpu"}
    log = (folder / "log").open("w+")
    started = time.monotonic()
    process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
    if cgroup is not None:
        (cgroup / "cgroup.procs").write_text(str(process.pid))
    anonymous = peak = 0.0
    while process.poll() is None:
        if time.monotonic() - started > _LONGEST_S:
            process.kill()
        memory = _memory_mb(process.pid)
        anonymous, peak = max(anonymous, memory[0]), max(peak, memory[1])
        time.sleep(_SAMPLE_S)
    _sync(output)
    seconds = time.monotonic() - started
    log.close()
    outcome = (
        "ok" if process.returncode == 0 else f"failed ({_reason(process.returncode, seconds)})"
    )
    _remove(output)
    return Run(seconds=seconds, anonymous_mb=anonymous, peak_mb=peak, outcome=outcome)


def _reason(code: int, seconds: float) -> str:
    if code == -signal.SIGKILL:
        return "ended after it" if seconds > _LONGEST_S else "out of memory"
    return f"exit code {code}"


def _memory_mb(pid: int) -> tuple[float, float]:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0.0, 0.0
    values = {
        line.split(":")[0]: line.split()[1] for line in lines if line.startswith(("Rss", "VmH"))
    }
    return int(values.get("RssAnon", 0)) / 1024, int(values.get("VmHWM", 0)) / 1024


def _warm(source: Path) -> None:
    """Bring it into the page cache, from which the tools before may have pushed it."""
    buffer = bytearray(1 << 20)
    for path in [source] if source.is_file() else [p for p in source.rglob("*") if p.is_file()]:
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def _prime(reference: Path) -> None:
    """Have free memory at hand: a virtual machine gives it back when it isn't used for seconds."""
    path = reference.with_name("prime")
    subprocess.run(["cp", str(reference), str(path)], check=True)
    _sync(path)
    path.unlink()


def _sync(output: Path) -> None:
    paths = [output] if output.is_file() else [p for p in output.rglob("*") if p.is_file()]
    for path in paths:
        with path.open("rb") as file:
            os.fsync(file.fileno())


def _remove(output: Path) -> None:
    if output.is_dir():
        shutil.rmtree(output)
    output.unlink(missing_ok=True)
    shutil.rmtree(output.with_name(output.name + ".partial"), ignore_errors=True)


def write_all(folder: Path, gigabytes: float, sources: Sequence[str]) -> None:
    """The checkpoints, and files of the output's size for `cp`."""
    shapes = llama_shapes(gigabytes)
    for stage in (2, 3):
        if f"zero{stage}" in sources:
            write_zero(folder / f"zero{stage}", stage, shapes)
    if "dcp" in sources:
        write_dcp(folder / "dcp", shapes)
    for dtype in ("fp32", "bf16"):
        places = {"source": folder / sources[0], "output": folder / "made"}
        command = [part.format(**places) for part in _OURS]
        subprocess.run(
            [*command, "--dtype", dtype, "--max-shard-size", "1TB"],
            check=True,
            capture_output=True,
            env={**os.environ, "PYTHONPATH": str(_ROOT)},
        )
        next((folder / "made").glob("*.safetensors")).rename(folder / f"reference-{dtype}")
        shutil.rmtree(folder / "made")


def limited(limit_mb: int) -> Path:
    """A new memory cgroup of that size."""
    for parent, name in (
        (Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes"),
        (Path("/sys/fs/cgroup"), "memory.max"),
    ):
        group = parent / f"bigtrain-{os.getpid()}"
        try:
            group.mkdir()
            (group / name).write_text(str(limit_mb << 20))
        except OSError:
            continue
        return group
    sys.exit("--limit-mb needs root and a memory cgroup")


def show(results: Results) -> None:
    """The table, with ratios to `cp` of the same output and to the fastest peer."""
    rows = [(tool, results[_key(tool)]) for tool in tools() if _key(tool) in results]
    medians = {_key(tool): statistics.median(r.seconds for r in kept.runs) for tool, kept in rows}
    peers = [
        medians[_key(tool)]
        for tool, kept in rows
        if tool.name not in (_CP, _OURS_FP32, _OURS_BF16) and _fault(kept.runs) is None
    ]
    fastest = min(peers, default=math.nan)
    print(
        f"{'tool':26} {'source':7} {'s':>7} {'× cp':>6} {'× peer':>7} {'own MB':>7} {'peak MB':>8}"
        "  with little memory"
    )
    for tool, kept in rows:
        seconds = medians[_key(tool)]
        to_cp = statistics.median(run.seconds / run.cp_seconds for run in kept.runs)
        own, peak = (max(getattr(run, n) for run in kept.runs) for n in ("anonymous_mb", "peak_mb"))
        outcome = _fault(kept.runs) or "; ".join(
            f"{run.outcome}, {run.seconds:.1f} s, {run.peak_mb:.0f} MB" for run in kept.limited
        )
        print(
            f"{tool.name:26} {tool.source:7} {seconds:7.2f} {to_cp:6.2f} {seconds / fastest:7.2f} "
            f"{own:7.0f} {peak:8.0f}  {outcome}"
        )


def _fault(runs: Sequence[Run]) -> str | None:
    return next((run.outcome for run in runs if run.outcome != "ok"), None)


def measure(arguments: argparse.Namespace, results: Results) -> None:
    """Make the checkpoints, run every tool, remove all; enter the runs into `results`."""
    sources = [arguments.source] if arguments.source else list(_SOURCES)
    reach = {"fp32", "bf16", *sources, *(["hf"] if "dcp" in sources else [])}
    contestants = [
        tool
        for tool in tools()
        if tool.source in reach and (arguments.only in tool.name or tool.name == _CP)
    ]
    with tempfile.TemporaryDirectory(dir=arguments.folder, prefix="consolidate-") as name:
        folder = Path(name)
        write_all(folder, arguments.size, sources)
        os.sync()
        for _ in range(arguments.repeats):
            copied: dict[str, float] = {}
            for tool in contestants:
                done = run(tool, folder)
                copied.setdefault(_output(tool), done.seconds)
                done = replace(done, cp_seconds=copied[_output(tool)])
                results.setdefault(_key(tool), Kept()).runs.append(done)
        if arguments.limit_mb:
            group = limited(arguments.limit_mb)
            for tool in contestants:
                results[_key(tool)].limited.append(run(tool, folder, cgroup=group))
            group.rmdir()


def _output(tool: Tool) -> str:
    return "bf16" if tool.name == _OURS_BF16 or tool.source == "bf16" else "fp32"


def load(path: Path | None) -> Results:
    """What earlier calls measured."""
    if path is None or not path.exists():
        return {}
    return {
        key: Kept(**{kind: [Run(**each) for each in runs] for kind, runs in kept.items()})
        for key, kept in json.loads(path.read_text()).items()
    }


def main() -> None:
    """Make, measure, show, remove."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=float, default=1.3, help="GB of fp32 output")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where to work; needs ten times the size")
    parser.add_argument("--limit-mb", type=int, help="run once more with this much memory")
    parser.add_argument("--only", default="", help="only tools with this in their name, and cp")
    parser.add_argument("--source", choices=_SOURCES, help="only this kind of checkpoint")
    parser.add_argument("--results", type=Path, help="a file of runs to add to")
    parser.add_argument("--show", type=Path, help="measure nothing: the table of such a file")
    arguments = parser.parse_args()
    results = load(arguments.show or arguments.results)
    if not arguments.show:
        measure(arguments, results)
    if arguments.results:
        kept = {key: asdict(value) for key, value in results.items()}
        arguments.results.write_text(json.dumps(kept, indent=1))
    show(results)


def _key(tool: Tool) -> str:
    return f"{tool.name} {tool.source}"


if __name__ == "__main__":
    main()
