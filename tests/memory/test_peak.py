"""Predicted peaks against those of real steps; the whole table is benchmarks/memory.py's."""

from __future__ import annotations

import dataclasses
import gc
import importlib.util
import sys
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from bigtrain.engine import build_engine
from bigtrain.memory.live_bytes import LiveBytes
from bigtrain.topology import RankInfo
from tests.engine.harness import run_ranks

_BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "memory.py"
_TINY = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
}


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    spec = importlib.util.spec_from_file_location("benchmark_memory", _BENCHMARK)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    module.MODELS["tiny"] = _TINY
    return module


def _case(benchmark: ModuleType, engine: str, ranks: int, **more: Any) -> Any:
    fields = {"model": "tiny", "dtype": "fp32", "batch": 2, "sequence": 64, "recompute": False}
    return benchmark.Case(engine=engine, ranks=ranks, **(fields | more))


def _counted(world: RankInfo, benchmark: ModuleType, case: Any) -> tuple[int, int]:
    device = torch.device("cpu")
    counted = benchmark._counted_peak(case, world, device)
    profiled = benchmark.profiled_peak(case, world, device) if world.world_size == 1 else 0
    return counted, profiled


def test_the_dispatch_mode_counts_what_the_profiler_does(benchmark: ModuleType) -> None:
    for more in ({}, {"recompute": True}, {"dtype": "bf16"}):
        [(counted, profiled)] = run_ranks(
            1, _counted, benchmark, _case(benchmark, "single", 1, **more)
        )
        assert counted == pytest.approx(profiled, rel=0.01)


@pytest.mark.parametrize(
    ("engine", "ranks", "more"),
    [
        ("single", 1, {}),
        ("single", 1, {"recompute": True, "dtype": "bf16"}),
        ("single", 1, {"lora": True, "dtype": "bf16"}),
        ("single", 1, {"dtype": "fp16 O2"}),
        ("single", 1, {"dtype": "fp16 O2", "recompute": True}),
        ("single", 1, {"dtype": "fp16 O3"}),
        ("ddp", 2, {}),
        ("fsdp", 2, {"dtype": "bf16"}),
        ("fsdp", 2, {"accumulation": 2}),
    ],
)
def test_the_formula_is_near_even_for_a_tiny_model(
    benchmark: ModuleType, engine: str, ranks: int, more: dict[str, Any]
) -> None:
    case = _case(benchmark, engine, ranks, **more)

    counted, _ = run_ranks(ranks, _counted, benchmark, case)[0]
    plan = benchmark.estimate.estimate(benchmark._request(case))

    assert plan.peak == pytest.approx(counted, rel=0.25)


def _evaluated(world: RankInfo, benchmark: ModuleType, case: Any) -> int:
    """The peak of live bytes in an evaluation after a step."""
    request = benchmark._request(case)
    with LiveBytes() as meter:
        engine = build_engine(request.config, world=world, device=torch.device("cpu"))
        model = engine.construct(
            lambda: benchmark._make_model(case), lambda: benchmark._make_skeleton(case)
        )
        model = engine.prepare(model, benchmark._make_optimizer(model))
        for batch in (2, 8):
            ids = torch.randint(0, 512, (batch, case.sequence))
            gc.collect()
            meter.peak = meter.live
            with nullcontext() if batch == 2 else torch.no_grad(), engine.autocast():
                loss = model(input_ids=ids, labels=ids).loss
            if batch == 2:
                engine.backward(loss)
                engine.step(1.0)
                engine.zero_grad()
    engine.close()
    return meter.peak


@pytest.mark.parametrize(
    ("engine", "ranks", "more"),
    [
        ("single", 1, {}),
        ("single", 1, {"dtype": "bf16"}),
        ("fsdp", 2, {"dtype": "bf16"}),
        ("zero2", 2, {"dtype": "bf16"}),
        ("zero3", 2, {}),
    ],
)
def test_the_formula_of_an_evaluation_is_near(
    benchmark: ModuleType, engine: str, ranks: int, more: dict[str, Any]
) -> None:
    case = _case(benchmark, engine, ranks, sequence=128, **more)

    counted = run_ranks(ranks, _evaluated, benchmark, case)[0]
    request = dataclasses.replace(benchmark._request(case), evaluates=True)
    plan = benchmark.estimate.estimate(request)

    assert plan.moments[-1].name == "evaluation"
    assert plan.lasting + plan.moments[-1].total == pytest.approx(counted, rel=0.25)


@pytest.mark.slow
@pytest.mark.parametrize(
    "text",
    [
        "llama-48M single 1 bf16 2×1024 recomputed",
        "mixtral-70M fsdp 2 bf16 2×512",
        "deep-52M fsdp 2 bf16 1×256 recomputed",
        "qwen2-61M zero3 2 bf16 2×512 recomputed",
        "deep-52M zero1 2 bf16 1×256 recomputed",
        "deep-52M zero2 2 bf16 1×256×2 recomputed",
        "deep-52M fsdp 2 bf16 1×256×2 recomputed",
        "llama-48M single 1 bf16 2×1024 LoRA",
        "deep-52M zero3 2 bf16 2×512 LoRA",
    ],
)
def test_trace_is_within_10_and_formula_within_25_percent(benchmark: ModuleType, text: str) -> None:
    case = next(case for case in benchmark.CASES if str(case) == text)

    outcome = benchmark.run_case(case, with_trace=True)

    assert outcome.measured > 200e6
    assert outcome.traced == pytest.approx(outcome.measured, rel=0.10)
    assert outcome.formula == pytest.approx(outcome.measured, rel=0.25)


def test_what_is_freed_is_counted_out() -> None:
    with LiveBytes() as meter:
        kept = torch.empty(1000)
        gone = torch.empty(500) + 1
        del gone
        resized = torch.empty(10)
        resized.untyped_storage().resize_(0)
    assert meter.live == kept.nbytes
    assert meter.peak == kept.nbytes + 2 * 500 * 4
