"""Consolidation against `cp` of the same bytes, and against the formats' own tools.

    python benchmarks/consolidate.py --size 1.3 --folder /fast/disk
    python benchmarks/consolidate.py --size 4 --repeats 2 --limit-mb 512
    python benchmarks/consolidate.py --json

Checkpoints of a Llama with that many GB of fp32 weights are made on the spot by 2 ranks: torch DCP
by torch (and as sharded safetensors, for torch's own consolidation), ZeRO-2 and ZeRO-3 by
`torch.save` of what DeepSpeed's engine saves (a real engine would need ten times the memory; the
moments, which nobody here reads, share the masters' bytes). Every repeat runs every tool once, in
turn, its source in the page cache and right after a `cp` as large; each is a process of its own,
timed from its start until its output is synced. Ours is the command, with the checks that it does
by itself. The process's memory is sampled: what it holds itself (anonymous), and its peak with the
pages of files. `--limit-mb` runs each tool once more in a memory cgroup (needs root and cgroup v1
or v2); `--only` leaves out the tools that haven't this in their name, `cp` aside.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).resolve().parents[1]
_WORLD = 2
_SAMPLE_S = 0.02
_VOCABULARY = 32_000
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
    outcome: str = "ok"


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
    found += [Tool(name=_OURS_FP32, source=source, command=_OURS) for source in _SOURCES]
    bf16 = [*_OURS, "--dtype", "bf16"]
    found += [Tool(name=_OURS_BF16, source=source, command=bf16) for source in _SOURCES]
    return found


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
        memory = _memory_mb(process.pid)
        anonymous, peak = max(anonymous, memory[0]), max(peak, memory[1])
        time.sleep(_SAMPLE_S)
    _sync(output)
    seconds = time.monotonic() - started
    log.close()
    outcome = "ok" if process.returncode == 0 else f"failed ({process.returncode})"
    _remove(output)
    return Run(seconds=seconds, anonymous_mb=anonymous, peak_mb=peak, outcome=outcome)


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


def llama_shapes(gigabytes: float) -> OrderedDict[str, tuple[int, ...]]:
    """Names and shapes of a Llama whose fp32 weights take about that much."""
    hidden = 1024 if gigabytes < 2 else 2048
    layer = 12 * hidden * hidden + 2 * hidden
    layers = max(1, round((gigabytes * 1e9 / 4 - 2 * _VOCABULARY * hidden) / layer))
    shapes: OrderedDict[str, tuple[int, ...]] = OrderedDict()
    shapes["model.embed_tokens.weight"] = (_VOCABULARY, hidden)
    for number in range(layers):
        begin = f"model.layers.{number}"
        for name in ("q_proj", "k_proj", "v_proj"):
            shapes[f"{begin}.self_attn.{name}.weight"] = (hidden, hidden)
        for name in ("gate_proj", "up_proj", "down_proj"):
            shapes[f"{begin}.mlp.{name}.weight"] = (3 * hidden, hidden)
        for name in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"{begin}.{name}.weight"] = (hidden,)
    shapes["model.norm.weight"] = (hidden,)
    shapes["lm_head.weight"] = (_VOCABULARY, hidden)
    return shapes


def write_zero(out: Path, stage: int, shapes: OrderedDict[str, tuple[int, ...]]) -> None:
    """What DeepSpeed 0.19 saves of one parameter group."""
    import torch
    from deepspeed.runtime.zero.config import ZeroStageEnum

    step = out / "global_step1"
    step.mkdir(parents=True)
    (out / "latest").write_text(step.name)
    sizes = [math.prod(shape) for shape in shapes.values()]
    total = sum(sizes)
    share = -(-total // (2 * _WORLD)) * 2 if stage == 2 else sum(-(-n // _WORLD) for n in sizes)
    names = [OrderedDict((name, torch.Size(shape)) for name, shape in shapes.items())]
    common: dict[str, Any] = {
        "buffer_names": [],
        "param_shapes": names,
        "frozen_param_shapes": {},
        "frozen_param_fragments": {},
        "shared_params": {},
        "global_steps": 1,
        "mp_world_size": 1,
        "ds_version": "0.19.8",
    }
    for rank in range(_WORLD):
        masters = torch.empty(share).uniform_(-1, 1)
        padding = share * _WORLD - total if stage == 2 and rank == _WORLD - 1 else 0
        moments = {"step": torch.tensor(1.0), "exp_avg": masters, "exp_avg_sq": masters}
        inner = {"state": {0: moments}, "param_groups": [{"lr": 1e-3, "params": [0]}]}
        state: dict[str, Any] = {"zero_stage": ZeroStageEnum(stage)}
        if stage == 2:
            state |= {
                "base_optimizer_state": inner,
                "single_partition_of_fp32_groups": [masters[: share - padding]],
                "group_paddings": [padding],
                "param_alignment_paddings": [[0] * len(shapes)],
                "partition_count": [_WORLD],
            }
        else:
            empty = OrderedDict((name, torch.empty(0)) for name in shapes)
            name = f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt"
            torch.save({"module": empty, **common}, step / name)
            state |= {
                "optimizer_state_dict": inner,
                "fp32_flat_groups": [masters],
                "partition_count": _WORLD,
            }
        name = f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
        torch.save({"optimizer_state_dict": state}, step / name)
    if stage == 2:
        flat, at = torch.zeros(total, dtype=torch.bfloat16), 0
        module: OrderedDict[str, Any] = OrderedDict()
        for (name, shape), size in zip(shapes.items(), sizes, strict=True):
            module[name], at = flat[at : at + size].view(shape), at + size
        torch.save({"module": module, **common}, step / "mp_rank_00_model_states.pt")


def write_dcp(out: Path, shapes: OrderedDict[str, tuple[int, ...]]) -> None:
    """By torch itself, on two ranks."""
    script = (
        "import json, sys, torch, torch.distributed as dist, torch.distributed.checkpoint as dcp\n"
        "from torch.distributed.device_mesh import init_device_mesh\n"
        "from torch.distributed.tensor import DTensor, Shard\n"
        "dist.init_process_group('gloo')\n"
        f"mesh = init_device_mesh('cpu', ({_WORLD},))\n"
        "local = lambda shape: torch.empty(shape[0] // 2, *shape[1:]).uniform_(-1, 1)\n"
        "state = {name: DTensor.from_local(local(shape), mesh, [Shard(0)])\n"
        "         for name, shape in json.loads(sys.argv[2]).items()}\n"
        "dcp.save({'model': state}, checkpoint_id=sys.argv[1])\n"
        "where = sys.argv[1].replace('dcp', 'hf')\n"
        "writer = dcp.HuggingFaceStorageWriter(where, save_distributed=True,\n"
        "    fqn_to_index_mapping={name: 1 for name in state})\n"
        "dcp.save(state, storage_writer=writer)\n"
        "json.dump(list(state), open(where + '/names.json', 'w'))\n"
        "dist.destroy_process_group()\n"
    )
    path = out.with_name("write_dcp.py")
    path.write_text(script)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = [*launcher, f"--nproc-per-node={_WORLD}", str(path), str(out), json.dumps(shapes)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)


def write_all(folder: Path, gigabytes: float) -> None:
    """The checkpoints, and files of the output's size for `cp`."""
    shapes = llama_shapes(gigabytes)
    for stage in (2, 3):
        write_zero(folder / f"zero{stage}", stage, shapes)
    write_dcp(folder / "dcp", shapes)
    for dtype in ("fp32", "bf16"):
        places = {"source": folder / "zero3", "output": folder / "made"}
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


def show(rows: Sequence[tuple[Tool, list[Run], Run | None]]) -> None:
    """The table, with ratios to `cp` of the same output and to the fastest peer."""
    medians = {_key(tool): statistics.median(run.seconds for run in runs) for tool, runs, _ in rows}
    fine = {_key(tool) for tool, runs, _ in rows if all(run.outcome == "ok" for run in runs)}
    peers = [_key(tool) for tool, _, _ in rows if tool.name not in (_CP, _OURS_FP32, _OURS_BF16)]
    fastest = min((medians[key] for key in peers if key in fine), default=math.nan)
    print(
        f"{'tool':26} {'source':7} {'s':>7} {'× cp':>6} {'× peer':>7} {'own MB':>7} {'peak MB':>8}"
        "  under limit"
    )
    for tool, runs, under in rows:
        seconds = medians[_key(tool)]
        output = "bf16" if tool.name == _OURS_BF16 or tool.source == "bf16" else "fp32"
        own, peak = (max(getattr(run, n) for run in runs) for n in ("anonymous_mb", "peak_mb"))
        outcome = "" if under is None else f"{under.outcome}, {under.seconds:.1f} s"
        if any(run.outcome != "ok" for run in runs):
            outcome = next(run.outcome for run in runs if run.outcome != "ok")
        print(
            f"{tool.name:26} {tool.source:7} {seconds:7.2f} "
            f"{seconds / medians[f'{_CP} {output}']:6.2f} {seconds / fastest:7.2f} {own:7.0f} "
            f"{peak:8.0f}  {outcome}"
        )


def main() -> None:
    """Make, measure, show, remove."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=float, default=1.3, help="GB of fp32 output")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where to work; needs ten times the size")
    parser.add_argument("--limit-mb", type=int, help="run once more with this much memory")
    parser.add_argument("--only", help="besides cp, only tools with this in their name")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder, prefix="consolidate-") as name:
        folder = Path(name)
        write_all(folder, arguments.size)
        os.sync()
        runs: dict[str, list[Run]] = {}
        only = arguments.only or ""
        contestants = [tool for tool in tools() if only in tool.name or tool.name == _CP]
        for _ in range(arguments.repeats):
            for tool in contestants:
                runs.setdefault(_key(tool), []).append(run(tool, folder))
        under: dict[str, Run] = {}
        if arguments.limit_mb:
            group = limited(arguments.limit_mb)
            for tool in contestants:
                under[_key(tool)] = run(tool, folder, cgroup=group)
            group.rmdir()
        rows = [(tool, runs[_key(tool)], under.get(_key(tool))) for tool in contestants]
    if arguments.json:
        print(json.dumps([[t.name, t.source, [asdict(r) for r in rs]] for t, rs, _ in rows]))
    else:
        show(rows)


def _key(tool: Tool) -> str:
    return f"{tool.name} {tool.source}"


if __name__ == "__main__":
    main()
