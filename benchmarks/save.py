"""How long training waits for a checkpoint, and how long one takes to write and to load.

    python benchmarks/save.py [--parameters 300] [--ranks 2] [--repeats 3]
    python benchmarks/save.py --folder KEPT --results all.jsonl --only deepspeed
    python benchmarks/save.py --show all.jsonl

A Llama of about as many million parameters with AdamW's state, under FSDP2 on ranks of this
machine. In each repeat, one after another on the same state: bigtrain in the background and at
once, torch's `dcp.save`, its `async_save` by thread and by process, and, on the same model under
ZeRO-2, DeepSpeed's own `save_checkpoint`; and transformers' Trainer itself under FSDP with sharded
state dicts, in processes of its own (`transformers_saves.py`). Then what was written is loaded:
into the same engine and size, ours also into ZeRO-2 and onto other numbers of ranks, DeepSpeed's
also by way of `ds_to_universal` and by bigtrain.

`blocked` is what the training loop waits; `done` is until the files are complete
(bigtrain's are hashed, synced and committed by then, the others' are in the page cache). `memory`
is what a rank and its helpers took at most beyond what they had before the first save; bigtrain and
DCP's async ways keep a copy of the state in it. Medians, seconds, of the slowest rank.

Every figure is told as it is measured. With `--results` they add up in a file, over several calls;
with `--folder` what one phase has written stays there for the next one, which `--only` chooses.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import gc
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.update(DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1", GLOO_SOCKET_IFNAME="lo")

import psutil
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType
from transformers import LlamaConfig, LlamaForCausalLM

from bigtrain.checkpoint.load import group_names, open_checkpoint, restore
from bigtrain.checkpoint.manifest import Progress
from bigtrain.checkpoint.save import Saver, SaveRequest
from bigtrain.engine import build_engine, process_group
from bigtrain.topology import RankInfo, Topology
from bigtrain.translate import deepspeed
from bigtrain.translate.config import EngineConfig, EngineOptions, FsdpSettings

CPU = torch.device("cpu")
HIDDEN = 1024
# As without a GPU; the others need one.
STAGING = StagingOptions(
    use_pinned_memory=False,
    use_shared_memory=True,
    use_async_staging=False,
    use_non_blocking_copy=False,
)


OURS = "bigtrain"
DCP = "dcp sync"
ZERO = "DeepSpeed, ZeRO-2"
REST_S = 1.0
"""Before each save: the disk is still busy with what was deleted when `sync` has returned."""
KEPT = (OURS, DCP, ZERO)
"""What is loaded later; other files go at once, so that they don't fill the page cache."""


@dataclass(frozen=True)
class Bench:
    """What all phases are told."""

    folder: Path
    results: Path
    parameters: int
    ranks: int
    repeats: int

    def add(self, tool: str, **measured: float) -> None:
        """Keep figures of one run, and tell them."""
        told = ", ".join(f"{key} {value:.2f}" for key, value in measured.items())
        print(f"{tool}: {told}", file=sys.stderr, flush=True)
        with self.results.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"tool": tool, **measured}) + "\n")


def main() -> int:
    """Measure and print; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=_Raw)
    parser.add_argument("--parameters", type=int, default=300, help="millions")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where to write, and leave what is written")
    parser.add_argument("--only", choices=PHASES, action="append", help="this phase; repeatable")
    parser.add_argument("--results", type=Path, help="a file of figures to add to")
    parser.add_argument("--show", type=Path, help="measure nothing: the table of such a file")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    chosen = parser.parse_args()
    if chosen.show:
        report(chosen.show, as_json=chosen.json)
        return 0
    with tempfile.TemporaryDirectory() as temporary:
        bench = Bench(
            folder=chosen.folder or Path(temporary),
            results=chosen.results or Path(temporary) / "results.jsonl",
            parameters=chosen.parameters,
            ranks=chosen.ranks,
            repeats=chosen.repeats,
        )
        bench.folder.mkdir(parents=True, exist_ok=True)
        for name in chosen.only or PHASES:
            PHASES[name](bench)
        report(bench.results, as_json=chosen.json)
    return 0


class _Raw(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    pass


def report(results: Path, *, as_json: bool) -> None:
    """Print the medians of all runs in the file."""
    runs: dict[str, dict[str, list[float]]] = {}
    for line in results.read_text(encoding="utf-8").splitlines():
        measured = json.loads(line)
        tool = runs.setdefault(measured.pop("tool"), {})
        for key, value in measured.items():
            tool.setdefault(key, []).append(value)
    medians = {
        tool: {key: statistics.median(values) for key, values in measured.items()}
        for tool, measured in runs.items()
    }
    if as_json:
        print(json.dumps(medians))
        return
    base = medians.get(DCP, {})
    print(f"{'':34}{'blocked':>9}{'× dcp':>7}{'done':>8}{'memory +MB':>12}{'load':>8}{'× dcp':>7}")
    for tool, row in medians.items():
        cells = [
            _cell(row.get("blocked"), 9),
            _times(row, base, "blocked"),
            _cell(row.get("done"), 8),
        ]
        cells += [
            _cell(row.get("memory"), 12, 0),
            _cell(row.get("load"), 8),
            _times(row, base, "load"),
        ]
        print(f"{tool:34}{''.join(cells)}")


def _cell(value: float | None, width: int, digits: int = 2) -> str:
    return " " * width if value is None else f"{value:{width}.{digits}f}"


def _times(row: Mapping[str, float], base: Mapping[str, float], key: str) -> str:
    return _cell(row[key] / base[key] if key in row and key in base else None, 7)


# ---- Phases, each in its own processes ----


def measure_fsdp(world: RankInfo, bench: Bench) -> None:
    """All that can save and load the state of an FSDP2 engine."""
    engine = make_engine("fsdp", world, bench.parameters)
    optimizer = engine.optimizer
    saver = Saver(world, in_background=True)
    saver.warm_up(engine)
    now = Saver(world, in_background=False)
    stager = DefaultStager(STAGING)

    def state() -> dict[str, Any]:
        return {
            "model": get_model_state_dict(engine._model),
            "optim": get_optimizer_state_dict(engine._model, optimizer),
        }

    def ours(path: Path, *, wait: bool) -> Callable[[], Any]:
        chosen_saver = now if wait else saver
        chosen_saver.save(request(path), engine, wait=wait)
        return chosen_saver.finish

    def by_dcp(path: Path, kind: Any = None) -> Callable[[], Any]:
        if kind is None:
            dcp.save(state(), checkpoint_id=path)
            return lambda: None
        future: Any = dcp.async_save(
            state(),
            checkpoint_id=path,
            async_checkpointer_type=kind,
            async_stager=stager,
        )
        upload = getattr(future, "upload_completion", future)
        if hasattr(future, "staging_completion"):
            future.staging_completion.result()
        return upload.result  # type: ignore[no-any-return]

    ways: dict[str, Callable[[Path], Callable[[], Any]]] = {
        OURS: lambda path: ours(path, wait=False),
        "bigtrain, async_save: false": lambda path: ours(path, wait=True),
        DCP: by_dcp,
        "dcp async, thread": lambda path: by_dcp(path, AsyncCheckpointerType.THREAD),
        "dcp async, process": lambda path: by_dcp(path, AsyncCheckpointerType.PROCESS),
    }
    measure_saves(ways, world, bench)
    loads: dict[str, Callable[[], Any]] = {
        OURS: lambda: load_ours(engine, bench.folder / OURS, world),
        DCP: lambda: dcp.load(state(), checkpoint_id=bench.folder / DCP),
    }
    measure_loads(loads, world, bench)
    saver.close()


def measure_other_size(world: RankInfo, bench: Bench) -> None:
    """What so many ranks take to load the checkpoint of another number of ranks."""
    engine = make_engine("fsdp", world, bench.parameters)
    name = f"bigtrain, {bench.ranks} ranks' onto {world.world_size}"
    measure_loads({name: lambda: load_ours(engine, bench.folder / OURS, world)}, world, bench)


def measure_transformers(bench: Bench) -> None:
    """transformers' Trainer, as its users have it."""
    own = bench.folder / "transformers"
    shutil.rmtree(own, ignore_errors=True)
    own.mkdir()
    script = Path(__file__).with_name("transformers_saves.py")
    command = [sys.executable, "-m", "bigtrain", "launch", str(script), "--engine", "fsdp"]
    command += ["--procs-per-node", str(bench.ranks), "--output-dir", str(own / "logs")]
    command += ["--env", "FSDP_STATE_DICT_TYPE=SHARDED_STATE_DICT", "--"]
    words = [str(own), str(bench.parameters), str(bench.repeats)]
    done = subprocess.run([*command, *words], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"transformers_saves.py: {done.stdout[-2000:]}{done.stderr[-2000:]}")
    found = json.loads((own / "answer.json").read_text())
    for key, values in found.items():
        for value in values:
            bench.add("transformers' Trainer (FSDP)", **{key: value})
    shutil.rmtree(own)


def measure_deepspeed(world: RankInfo, bench: Bench) -> None:
    """DeepSpeed's own under ZeRO-2, and loading into it what bigtrain saved under FSDP2."""
    engine = make_engine("zero2", world, bench.parameters)

    def save(path: Path) -> Callable[[], Any]:
        engine._deepspeed.save_checkpoint(str(path))
        return lambda: None

    measure_saves({ZERO: save}, world, bench)
    theirs = bench.folder / ZERO
    loads: dict[str, Callable[[], Any]] = {
        ZERO: lambda: engine._deepspeed.load_checkpoint(str(theirs)),
        "bigtrain, FSDP's into ZeRO-2": lambda: load_ours(engine, bench.folder / OURS, world),
        "bigtrain, DeepSpeed's into ZeRO-2": lambda: load_ours(engine, theirs, world),
    }
    measure_loads(loads, world, bench)


def measure_universal(world: RankInfo, bench: Bench) -> None:
    """DeepSpeed's way to another size: convert, then load what was converted."""
    saved = bench.folder / ZERO
    tag = (saved / "latest").read_text().strip()
    begun = time.perf_counter()
    if world.is_main:
        shutil.rmtree(saved / "universal", ignore_errors=True)
        command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal"]
        command += ["--input_folder", str(saved / tag), "--output_folder", str(saved / "universal")]
        command += ["--num_extract_workers", "2", "--num_merge_workers", "2"]
        subprocess.run([*command, "--inject_missing_state"], check=True, capture_output=True)
        (saved / "latest_universal").write_text("universal")
        bench.add("ds_to_universal", done=time.perf_counter() - begun)
    dist.barrier()
    engine = make_engine("zero2", world, bench.parameters, universal=True)
    loads = {
        "DeepSpeed, universal": lambda: engine._deepspeed.load_checkpoint(
            str(saved), tag="universal"
        )
    }
    measure_loads(loads, world, dataclasses.replace(bench, repeats=1))


def on_ranks(phase: Callable[[RankInfo, Bench], None], *others: int) -> Callable[[Bench], None]:
    """The phase on as many ranks as asked; or on one, and on as many more as given."""

    def run(bench: Bench) -> None:
        for ranks in [1, *(bench.ranks + more for more in others)] if others else [bench.ranks]:
            run_ranks(phase, bench, ranks)

    return run


PHASES: dict[str, Callable[[Bench], None]] = {
    "fsdp": on_ranks(measure_fsdp),
    "sizes": on_ranks(measure_other_size, 1),
    "deepspeed": on_ranks(measure_deepspeed),
    "universal": on_ranks(measure_universal),
    "transformers": measure_transformers,
}
"""Those after the first read what it wrote; `universal` also what `deepspeed` did."""


def measure_saves(
    ways: dict[str, Callable[[Path], Callable[[], Any]]], world: RankInfo, bench: Bench
) -> None:
    """Each way once per repeat, after another one each time; what it took."""
    for repeat in range(bench.repeats + 1):
        first = repeat % len(ways)
        for name, save in (list(ways.items()) * 2)[first : first + len(ways)]:
            path = bench.folder / name
            if world.is_main:
                shutil.rmtree(path, ignore_errors=True)
                os.sync()
                forget(bench.folder)
            gc.collect()
            time.sleep(REST_S)
            dist.barrier()
            with PeakMemory() if not repeat else contextlib.nullcontext() as memory:
                begun = time.perf_counter()
                finish = save(path)
                blocked = time.perf_counter() - begun
                finish()
                done = time.perf_counter() - begun
            if memory is not None:  # the first round, which also warms up
                found = {"memory": slowest(memory.grown / 1e6)}
            else:
                found = {"blocked": slowest(blocked), "done": slowest(done)}
            if world.is_main:
                bench.add(name, **found)
                if name not in KEPT:
                    shutil.rmtree(path)


def forget(folder: Path) -> None:
    """Have the page cache drop these files, which are on the disk: the next save needs room in it,
    and is not to wait until the kernel has made it."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure_loads(loads: Mapping[str, Callable[[], Any]], world: RankInfo, bench: Bench) -> None:
    """How long each takes."""
    for _ in range(bench.repeats):
        for name, load in loads.items():
            dist.barrier()
            begun = time.perf_counter()
            load()
            took = slowest(time.perf_counter() - begun)
            if world.is_main:
                bench.add(name, load=took)


def load_ours(engine: Any, path: Path, world: RankInfo) -> None:
    """Fill the engine."""
    with open_checkpoint(path, names=group_names(engine)) as loaded:
        restore(engine, loaded, world=world)


def request(path: Path) -> SaveRequest:
    """A save without anything of a trainer's."""
    return SaveRequest(
        target=path,
        run_id="benchmark",
        progress=Progress(step=1),
        scheduler_state={"last_epoch": 1},
        rng_state={"cpu": torch.random.get_rng_state()},
        write_files=lambda staging: None,
    )


def slowest(value: float) -> float:
    """The largest over all ranks."""
    found = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return float(found)


class PeakMemory:
    """How much more memory this process and its children took at most than before, in bytes.

    Sampled, with what several of them share counted once. It is not cheap: not while timing.
    """

    def __enter__(self) -> PeakMemory:
        self._before, self.grown = _memory(), 0
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._sample)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._stopping.wait(0.05):
            self.grown = max(self.grown, _memory() - self._before)


def _memory() -> int:
    own = psutil.Process()
    total = 0
    for process in (own, *own.children(recursive=True)):
        try:
            lines = Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines()
        except OSError:
            continue
        total += sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))
    return total


# ---- The model ----


def make_engine(name: Any, world: RankInfo, millions: int, *, universal: bool = False) -> Any:
    """An engine after one step, so that the optimizer has its state."""
    chosen = settings(name, world)
    if universal:
        json = {**chosen.json, "checkpoint": {"load_universal": True}}
        chosen = dataclasses.replace(chosen, json=json)
    engine: Any = build_engine(EngineConfig(name=name, settings=chosen), world=world, device=CPU)
    config = llama(millions)
    model = engine.construct(lambda: LlamaForCausalLM(config), lambda: skeleton(config))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    engine.prepare(model, optimizer)
    tokens = torch.randint(0, 1000, (1, 8))
    with engine.accumulating(last=True):
        callable_ = engine._deepspeed if name.startswith("zero") else engine._model
        engine.backward(callable_(input_ids=tokens).logits.float().mean())
    engine.step(1.0)
    engine.zero_grad()
    return engine


def llama(millions: int) -> LlamaConfig:
    """The configuration with about so many million parameters."""
    per_layer = 4 * HIDDEN * HIDDEN + 3 * HIDDEN * 4 * HIDDEN
    vocabulary = 32_000
    layers = max(1, round((millions * 1e6 - 2 * vocabulary * HIDDEN) / per_layer))
    return LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=4 * HIDDEN,
        num_hidden_layers=layers,
        num_attention_heads=16,
        vocab_size=vocabulary,
    )


def skeleton(config: LlamaConfig) -> LlamaForCausalLM:
    """The same modules without memory."""
    with torch.device("meta"):
        return LlamaForCausalLM(config)


def settings(name: Any, world: RankInfo) -> Any:
    """What the engine is told."""
    if name == "fsdp":
        return FsdpSettings(shard_size=world.world_size)
    return deepspeed.settings(
        {
            "per_device_train_batch_size": 1,
            "gradient_accumulation_steps": 1,
            "max_grad_norm": 1.0,
        },
        stage=2,
        topology=Topology(procs_per_node=world.world_size, shard_size=world.world_size),
        compute="fp32",
        options=EngineOptions(),
        on_cpu=True,
        hidden_size=HIDDEN,
    )


# ---- Ranks ----


def run_ranks(phase: Callable[[RankInfo, Bench], None], bench: Bench, ranks: int) -> None:
    """The phase on so many ranks. They are forked, so that imports are paid once."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = int(listener.getsockname()[1])
    pids = []
    for rank in range(ranks):
        if pid := os.fork():
            pids.append(pid)
            continue
        world = RankInfo(rank=rank, local_rank=rank, world_size=ranks, local_world_size=ranks)
        try:
            _run_rank(phase, bench, world, port)
            os._exit(0)
        except BaseException as fault:
            print(f"rank {rank}: {fault!r}", file=sys.stderr, flush=True)
            os._exit(1)
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    if any(codes):
        raise SystemExit(f"exit codes {codes}")


def _run_rank(
    phase: Callable[[RankInfo, Bench], None], bench: Bench, world: RankInfo, port: int
) -> None:
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "RANK": str(world.rank),
        "LOCAL_RANK": str(world.rank),
        "WORLD_SIZE": str(world.world_size),
    }
    torch.set_num_threads(1)
    process_group.join(world, device=CPU, timeout_s=600)
    phase(world, bench)
    dist.barrier()
    process_group.leave()


if __name__ == "__main__":
    raise SystemExit(main())
