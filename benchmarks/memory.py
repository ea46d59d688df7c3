"""Predicted against measured peak memory of a training step, on real engines.

    python benchmarks/memory.py                 # the table, on the CPU or the GPUs that are there
    python benchmarks/memory.py --write docs/memory.md
    python benchmarks/memory.py --only zero3 --json
    python benchmarks/memory.py --record FILE   # in pieces: what FILE holds is not measured again

Each case is a world of its own: ranks are forked, a model is trained for a few steps, and the peak
of live allocated bytes over the last ones is taken: on a CPU from the profiler's memory events
(every allocation and release since before the model was made), with several ranks from a dispatch
mode, on a GPU from `torch.cuda.max_memory_allocated`. The largest size of the process is shown
beside it; it holds what the allocator keeps and the libraries themselves, and is not judged.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import pickle
import resource
import socket
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bigtrain.memory import estimate, trace  # noqa: E402
from bigtrain.memory.adapters import with_adapters  # noqa: E402
from bigtrain.memory.families import from_formula  # noqa: E402
from bigtrain.memory.questions import Asker  # noqa: E402
from bigtrain.topology import RankInfo  # noqa: E402
from bigtrain.translate import topology_for, translate  # noqa: E402
from bigtrain.translate.config import EngineName  # noqa: E402

_STEPS = 3
_MARK = "<!-- measured -->"
MODELS: dict[str, dict[str, Any]] = {
    "llama-48M": {
        "model_type": "llama",
        "hidden_size": 512,
        "intermediate_size": 1536,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "vocab_size": 16384,
    },
    "qwen2-61M": {
        "model_type": "qwen2",
        "hidden_size": 640,
        "intermediate_size": 1728,
        "num_hidden_layers": 10,
        "num_attention_heads": 10,
        "num_key_value_heads": 2,
        "vocab_size": 16384,
        "tie_word_embeddings": True,
    },
    "deep-52M": {
        "model_type": "llama",
        "hidden_size": 512,
        "intermediate_size": 1408,
        "num_hidden_layers": 16,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "vocab_size": 1024,
    },
    "llama-199M": {
        "model_type": "llama",
        "hidden_size": 1024,
        "intermediate_size": 2816,
        "num_hidden_layers": 14,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "vocab_size": 16384,
    },
    "mixtral-70M": {
        "model_type": "mixtral",
        "hidden_size": 384,
        "intermediate_size": 768,
        "num_hidden_layers": 8,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "vocab_size": 8192,
    },
}


@dataclass(frozen=True, kw_only=True)
class Case:
    """One world that is measured."""

    model: str
    engine: EngineName
    ranks: int
    dtype: str
    """fp32, bf16, or fp16 with its level, such as `fp16 O2`."""
    batch: int
    sequence: int
    recompute: bool
    accumulation: int = 1
    lora: bool = False
    """Adapters on weights that are frozen in the precision that computes."""

    def __str__(self) -> str:
        shape = f"{self.batch}×{self.sequence}" + (
            f"×{self.accumulation}" * (self.accumulation > 1)
        )
        return (
            f"{self.model} {self.engine} {self.ranks} {self.dtype} {shape}"
            f"{' recomputed' if self.recompute else ''}{' LoRA' if self.lora else ''}"
        )


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Bytes on rank 0, of one case."""

    case: Case
    measured: int
    formula: int
    traced: int | None
    process: int
    parts: dict[str, int] = field(default_factory=dict)


CASES: tuple[Case, ...] = tuple(
    Case(
        model=m,
        engine=e,
        ranks=r,
        dtype=d,
        batch=b,
        sequence=s,
        recompute=c,
        accumulation=a,
        lora=bool(lora),
    )
    for m, e, r, d, b, s, c, a, *lora in (
        ("llama-48M", "single", 1, "fp32", 4, 256, False, 1),
        ("llama-48M", "single", 1, "fp32", 4, 256, True, 1),
        ("llama-48M", "single", 1, "bf16", 2, 1024, False, 1),
        ("llama-48M", "single", 1, "fp16 O2", 2, 512, False, 1),
        ("llama-48M", "single", 1, "bf16", 2, 1024, True, 1),
        ("qwen2-61M", "single", 1, "bf16", 8, 256, False, 1),
        ("mixtral-70M", "single", 1, "fp32", 2, 512, False, 1),
        ("deep-52M", "single", 1, "bf16", 4, 256, True, 1),
        ("deep-52M", "single", 1, "fp32", 1, 256, False, 1),
        ("llama-48M", "ddp", 2, "bf16", 2, 512, False, 1),
        ("qwen2-61M", "ddp", 2, "fp32", 1, 512, True, 1),
        ("llama-48M", "fsdp", 2, "bf16", 2, 512, False, 1),
        ("llama-48M", "fsdp", 2, "bf16", 4, 512, True, 1),
        ("llama-48M", "fsdp", 2, "fp32", 2, 256, False, 1),
        ("qwen2-61M", "fsdp", 2, "bf16", 1, 1024, True, 1),
        ("mixtral-70M", "fsdp", 2, "bf16", 2, 512, False, 1),
        ("deep-52M", "fsdp", 2, "bf16", 1, 256, True, 1),
        ("deep-52M", "fsdp", 3, "bf16", 2, 256, False, 1),
        ("llama-48M", "zero1", 2, "bf16", 2, 512, False, 1),
        ("llama-48M", "zero1", 2, "fp32", 2, 512, True, 1),
        ("deep-52M", "zero1", 2, "bf16", 1, 256, True, 1),
        ("deep-52M", "zero2", 2, "bf16", 1, 256, True, 1),
        ("deep-52M", "zero3", 2, "bf16", 1, 256, True, 1),
        ("qwen2-61M", "zero2", 2, "bf16", 2, 512, False, 1),
        ("llama-48M", "zero2", 2, "fp32", 2, 512, True, 1),
        ("llama-48M", "zero3", 2, "bf16", 2, 512, False, 1),
        ("deep-52M", "fsdp", 2, "bf16", 1, 256, True, 2),
        ("deep-52M", "zero2", 2, "bf16", 1, 256, True, 2),
        ("qwen2-61M", "zero3", 2, "bf16", 2, 512, True, 1),
        ("mixtral-70M", "zero3", 2, "bf16", 2, 512, False, 1),
        ("llama-48M", "single", 1, "bf16", 2, 1024, False, 1, "LoRA"),
        ("llama-48M", "single", 1, "bf16", 4, 1024, True, 1, "LoRA"),
        ("qwen2-61M", "single", 1, "fp32", 2, 512, False, 1, "LoRA"),
        ("qwen2-61M", "ddp", 2, "bf16", 2, 512, False, 1, "LoRA"),
        ("llama-48M", "fsdp", 2, "bf16", 2, 1024, False, 1, "LoRA"),
        ("deep-52M", "zero3", 2, "bf16", 2, 512, False, 1, "LoRA"),
        ("llama-199M", "single", 1, "bf16", 1, 512, False, 1, "LoRA"),
        ("llama-199M", "fsdp", 2, "bf16", 1, 512, True, 1, "LoRA"),
    )
)
LORA = {
    "rank": 16,
    "alpha": 32,
    "dropout": 0.0,
    "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"],
}


def main() -> None:
    """Measure, predict, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="cases whose text holds this")
    parser.add_argument("--no-trace", action="store_true", help="the formula alone")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--write", metavar="FILE", help="put the table into this document")
    parser.add_argument("--record", metavar="FILE", type=Path, help="what is measured already")
    parser.add_argument("--seconds", type=float, default=math.inf, help="no new case after these")
    options = parser.parse_args()
    recorded = _recorded(options.record)
    end = time.monotonic() + options.seconds
    outcomes = []
    for case in CASES:
        if options.only not in str(case):
            continue
        if case not in recorded and time.monotonic() > end:
            sys.exit(f"{len(recorded)} of {len(CASES)} cases are measured; run it again")
        if case not in recorded:
            recorded[case] = run_case(case, with_trace=not options.no_trace)
            _record(options.record, recorded[case])
            print(_row(recorded[case]), file=sys.stderr, flush=True)
        outcomes.append(recorded[case])
    if options.json:
        print(json.dumps([_plain(outcome) for outcome in outcomes], indent=2))
    else:
        print("\n".join(_table(outcomes)))
    if options.write:
        _write(Path(options.write), outcomes)


def run_case(case: Case, *, with_trace: bool) -> Outcome:
    """Measure one case, and predict it by formula and by trace."""
    measured = _in_ranks(case)
    request = _request(case)
    plan = estimate.estimate(request)
    assert plan is not None
    traced = _traced(case, request) if with_trace else None
    return Outcome(
        case=case,
        measured=measured[0]["peak"],
        process=measured[0]["process"],
        formula=plan.peak,
        traced=traced.peak if traced else None,
        parts=plan.parts(),
    )


def _traced(case: Case, request: estimate.Request) -> estimate.MemoryPlan:
    asker = Asker(cache=Path(tempfile.gettempdir()) / "bigtrain-shapes", environment=os.environ)
    question: dict[str, Any] = {"config": MODELS[case.model]}
    if case.lora:
        question["lora"] = LORA
    return trace.traced_estimate(request, question, asker=asker)


def _values(case: Case) -> dict[str, Any]:
    return {
        "bf16": case.dtype == "bf16",
        "fp16": case.dtype.startswith("fp16"),
        "fp16_opt_level": case.dtype.partition(" ")[2] or "O1",
        "per_device_train_batch_size": case.batch,
        "gradient_accumulation_steps": case.accumulation,
        "gradient_checkpointing": case.recompute,
    }


def _request(case: Case) -> estimate.Request:
    topology = topology_for(case.engine, procs_per_node=case.ranks)
    config = MODELS[case.model]
    shapes = from_formula(config, dtype=case.dtype if case.lora else "fp32")
    assert shapes is not None
    shapes = with_adapters(shapes, LORA if case.lora else None)
    device = _device()
    return estimate.Request(
        shapes=shapes,
        config=translate(
            _values(case),
            engine=case.engine,
            topology=topology,
            device=device,
            hidden_size=config["hidden_size"],
        ).engine,
        topology=topology,
        device=device,
        training=_values(case),
        sequence_length=case.sequence,
    )


def _device() -> Any:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _in_ranks(case: Case) -> list[dict[str, int]]:
    """What every rank measured. This process has not started CUDA, and forks."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        pids = [_fork(case, rank, port, Path(folder)) for rank in range(case.ranks)]
        for pid in pids:
            _, status = os.waitpid(pid, 0)
            if status:
                sys.exit(f"{case}: a rank failed")
        return [pickle.loads((Path(folder) / str(rank)).read_bytes()) for rank in range(case.ranks)]


def _fork(case: Case, rank: int, port: int, folder: Path) -> int:
    if pid := os.fork():
        return pid
    code = 1
    try:
        os.environ |= {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "GLOO_SOCKET_IFNAME": "lo",
            "LOCAL_RANK": str(rank),
            "OMP_NUM_THREADS": "1",
        }
        with (Path(os.devnull)).open("w") as silence:
            os.dup2(silence.fileno(), 1)
        world = RankInfo(
            rank=rank,
            local_rank=rank,
            world_size=case.ranks,
            local_world_size=case.ranks,
            source="benchmark",
        )
        (folder / str(rank)).write_bytes(pickle.dumps(_measure(case, world)))
        code = 0
    finally:
        os._exit(code)
    return 0


def _measure(case: Case, world: RankInfo) -> dict[str, int]:
    import torch

    from bigtrain.device import choose_device
    from bigtrain.engine import process_group

    name = _device()
    os.environ["DS_ACCELERATOR"] = name
    torch.set_num_threads(1)
    device = choose_device(name, world=world)
    process_group.join(world, device=device)
    if name == "cuda":
        for step in _train(case, world, device):
            if step == 1:
                torch.cuda.reset_peak_memory_stats()
        peak = torch.cuda.max_memory_allocated()
    else:
        # The profiler does not see what gloo's threads release.
        count = profiled_peak if world.world_size == 1 else _counted_peak
        peak = count(case, world, device)
    process = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"peak": peak, "process": process}


def _counted_peak(case: Case, world: RankInfo, device: Any) -> int:
    """The peak of live tensors from the second step on, by a dispatch mode."""
    from bigtrain.memory.live_bytes import LiveBytes

    with LiveBytes() as meter:
        for step in _train(case, world, device):
            if step == 0:
                meter.peak = meter.live
    return meter.peak


def profiled_peak(case: Case, world: RankInfo, device: Any) -> int:
    """The same from the profiler's memory events: exact where there is one thread and one rank."""
    from torch.profiler import ProfilerActivity, profile, record_function

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        for step in _train(case, world, device):
            if step == 0:
                with record_function("first step done"):
                    pass
    live = peak = 0
    counts = False
    events = sorted(profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    for event in events:
        counts = counts or event.name() == "first step done"
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live) if counts else peak
    return peak


def _train(case: Case, world: RankInfo, device: Any) -> Iterator[int]:
    """The trainer's loop over the engine; yields after each step."""
    import torch

    from bigtrain.engine import build_engine

    request = _request(case)
    engine = build_engine(request.config, world=world, device=device)
    model = engine.construct(lambda: _make_model(case), lambda: _make_skeleton(case))
    model = engine.prepare(model, _make_optimizer(model))
    vocabulary = MODELS[case.model]["vocab_size"]
    for step in range(_STEPS):
        for micro in range(case.accumulation):
            ids = torch.randint(0, vocabulary, (case.batch, case.sequence), device=device)
            with engine.accumulating(last=micro == case.accumulation - 1):
                with engine.autocast():
                    loss = model(input_ids=ids, labels=ids).loss
                engine.backward(loss)
        engine.step(1.0)
        engine.zero_grad()
        gc.collect()  # what making the model left behind in cycles is no part of a step
        yield step
    engine.close()


def _make_model(case: Case) -> Any:
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    from bigtrain.model_section import add_adapters

    fields = dict(MODELS[case.model])
    torch.manual_seed(0)
    is_narrow = case.lora and case.dtype == "bf16"
    model: Any = AutoModelForCausalLM.from_config(
        CONFIG_MAPPING[fields.pop("model_type")](**fields),
        dtype=torch.bfloat16 if is_narrow else torch.float32,
    )
    if case.lora:
        model = add_adapters(model, LORA)
    model.config.use_cache = False
    if case.recompute:
        model.gradient_checkpointing_enable()
    return model.train()


def _make_skeleton(case: Case) -> Any:
    import torch

    with torch.device("meta"):
        return _make_model(case)


def _make_optimizer(model: Any) -> Any:
    import torch

    from bigtrain.memory.shapes import Parameter

    named = [
        (Parameter(name=n, shape=tuple(p.shape)), p)
        for n, p in model.named_parameters()
        if p.requires_grad
    ]
    return torch.optim.AdamW(
        [
            {"params": [p for shape, p in named if shape.is_decayed], "weight_decay": 0.1},
            {"params": [p for shape, p in named if not shape.is_decayed], "weight_decay": 0.0},
        ],
        lr=1e-4,
        fused=True,
    )


def _row(outcome: Outcome) -> str:
    case, megabyte = outcome.case, 1e6

    def off(predicted: int | None) -> str:
        if predicted is None:
            return "–"
        change = 100 * (predicted / outcome.measured - 1)
        return f"{predicted / megabyte:,.0f} ({change:+.0f} %)"

    tokens = f"{case.batch}×{case.sequence}"
    if case.accumulation > 1:
        tokens += f", {case.accumulation} micro-batches"
    recompute = "yes" if case.recompute else "no"
    model = f"{case.model}{', LoRA' if case.lora else ''}"
    return (
        f"| {model} | {case.engine} × {case.ranks} | {case.dtype} | {tokens} | {recompute} | "
        f"{outcome.measured / megabyte:,.0f} | {off(outcome.formula)} | {off(outcome.traced)} | "
        f"{outcome.process / megabyte:,.0f} |"
    )


def _table(outcomes: list[Outcome]) -> list[str]:
    return [
        "| model | engine | precision | batch | recomputed | measured MB | formula | trace "
        "| process MB |",
        "|---|---|---|---|---|---|---|---|---|",
        *(_row(outcome) for outcome in outcomes),
    ]


def _recorded(path: Path | None) -> dict[Case, Outcome]:
    lines = path.read_text(encoding="utf-8").splitlines() if path and path.is_file() else []
    found = (json.loads(line) for line in lines)
    outcomes = [Outcome(**{**plain, "case": Case(**plain["case"])}) for plain in found]
    return {outcome.case: outcome for outcome in outcomes}


def _record(path: Path | None, outcome: Outcome) -> None:
    if path is not None:
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(_plain(outcome)) + "\n")


def _plain(outcome: Outcome) -> dict[str, Any]:
    return {**vars(outcome), "case": vars(outcome.case)}


def _write(path: Path, outcomes: list[Outcome]) -> None:
    """Replace what stands between the two marks of the document."""
    before, _, rest = path.read_text(encoding="utf-8").partition(_MARK)
    _, _, after = rest.partition(_MARK)
    table = "\n".join(_table(outcomes))
    path.write_text(f"{before}{_MARK}\n{table}\n{_MARK}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
