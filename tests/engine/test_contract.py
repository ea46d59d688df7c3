"""The same steps on every engine do the same: one process alone is the reference.

All runs of a group share one start of two ranks; each test then looks at one engine's.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bigtrain.topology import RankInfo
from bigtrain.translate.config import EngineName
from tests.engine import recipes
from tests.engine.harness import run_ranks
from tests.engine.recipes import SPANNING, Recipe, Record

RECIPES = {
    "plain": Recipe(),
    "windows": Recipe(windows=(3,), short_last_window=1, uneven=True),
    "bf16": Recipe(compute_dtype="bf16"),
    "tied": Recipe(tied=True, steps=5),
    "frozen": Recipe(frozen=("embed_tokens", "layers.0.mlp"), steps=5),
    "fp16": Recipe(compute_dtype="fp16", overflow_at=3, steps=8),
}
FP16_ENGINES = ("ddp", "fsdp")

Runs = dict[tuple[str, str], Record]


def _train_all(world: RankInfo, engines: tuple[EngineName, ...]) -> Runs:
    return {
        (name, key): recipes.run(world, name, recipe)
        for name in engines
        for key, recipe in RECIPES.items()
        if key != "fp16" or name in ("single", *FP16_ENGINES)
    }


@pytest.fixture(scope="module")
def alone() -> Runs:
    return run_ranks(1, _train_all, ("single",))[0]


@pytest.fixture(scope="module")
def together() -> list[Runs]:
    return run_ranks(2, _train_all, SPANNING)


def worst(ours: list[float], theirs: list[float]) -> float:
    return max(abs(a / b - 1) for a, b in zip(ours, theirs, strict=True))


def losses(ranks: list[Runs], key: tuple[str, str]) -> list[float]:
    """Each rank's share of the global loss, added up."""
    return [sum(shares) for shares in zip(*(runs[key].losses for runs in ranks), strict=True)]


def largest_difference(ours: Record, theirs: Record) -> float:
    assert ours.weights.keys() == theirs.weights.keys()
    return max(
        float((ours.weights[name] - theirs.weights[name]).abs().max())  # type: ignore[operator]
        for name in theirs.weights
    )


@pytest.mark.parametrize("recipe", ["plain", "windows", "tied", "frozen"])
@pytest.mark.parametrize("engine", SPANNING)
def test_fp32_steps_equal_those_of_one_process(
    engine: str, recipe: str, alone: Runs, together: list[Runs]
) -> None:
    reference = alone["single", recipe]
    found = together[0][engine, recipe]

    assert worst(losses(together, (engine, recipe)), reference.losses) < 1e-6
    assert worst(found.norms, reference.norms) < 1e-6
    assert largest_difference(found, reference) < 1e-5
    assert not any(found.skipped)


@pytest.mark.parametrize("engine", SPANNING)
def test_bf16_losses_stay_near_those_of_one_process(
    engine: str, alone: Runs, together: list[Runs]
) -> None:
    assert worst(losses(together, (engine, "bf16")), alone["single", "bf16"].losses) < 1e-3
    # Kept in fp32 although the arithmetic is bf16.
    dtypes = {w.dtype for w in together[0][engine, "bf16"].weights.values() if w is not None}
    assert dtypes == {torch.float32}


@pytest.mark.parametrize("engine", ["single", *FP16_ENGINES])
def test_an_fp16_overflow_on_one_rank_skips_the_step_on_all(
    engine: str, alone: Runs, together: list[Runs]
) -> None:
    for runs in [alone] if engine == "single" else together:
        record = runs[engine, "fp16"]
        assert record.skipped == [step == 3 for step in range(8)]
        assert record.scales == [65536.0] * 3 + [32768.0] * 5
    if engine != "single":
        after = slice(4, None)
        ours = losses(together, (engine, "fp16"))[after]
        assert worst(ours, alone["single", "fp16"].losses[after]) < 1e-3


@pytest.mark.parametrize("engine", ["fsdp", "zero1", "zero2", "zero3"])
def test_only_rank_0_builds_the_whole_model(engine: str, together: list[Runs]) -> None:
    first, second = (set(runs[engine, "plain"].devices.values()) for runs in together)

    assert first == {"cpu"}
    assert second == {"meta"}


@pytest.mark.parametrize("engine", SPANNING)
def test_whole_weights_appear_on_rank_0_only(engine: str, together: list[Runs]) -> None:
    first, second = (runs[engine, "plain"].weights for runs in together)

    assert list(first) == list(second)
    assert all(tensor is not None for tensor in first.values())
    assert all(tensor is None for tensor in second.values())


@pytest.mark.parametrize("engine", SPANNING)
def test_frozen_weights_stay_as_they_were(engine: str, together: list[Runs]) -> None:
    recipe = RECIPES["frozen"]
    before: dict[str, Any] = dict(recipes.make_model(recipe).named_parameters())
    after = together[0][engine, "frozen"].weights

    for name, parameter in before.items():
        assert torch.equal(parameter, after[name]) != parameter.requires_grad, name  # type: ignore[arg-type]
