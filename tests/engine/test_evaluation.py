"""Evaluation and generation work on every engine: before there is an optimizer, and after steps."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bigtrain.engine import build_engine
from bigtrain.topology import RankInfo
from bigtrain.translate.config import EngineName
from tests.engine import recipes
from tests.engine.harness import run_ranks
from tests.engine.recipes import CPU, SPANNING, Recipe

RECIPE = Recipe(steps=3)
BATCH = torch.arange(1, 33).view(2, 16)


def _evaluate_around_training(world: RankInfo, engines: tuple[EngineName, ...]) -> dict[str, Any]:
    return {name: _around_training(world, name) for name in engines}


def _around_training(world: RankInfo, name: EngineName) -> list[tuple[float, list[int]]]:
    config = recipes.engine_config(name, world_size=world.world_size)
    engine = build_engine(config, world=world, device=CPU)
    plain = engine.construct(
        lambda: recipes.make_model(RECIPE), lambda: recipes.make_skeleton(RECIPE)
    )
    model = engine.prepare(plain, None)
    found = [_look(engine, model, plain)]
    model = engine.prepare(plain, recipes.make_optimizer(plain))
    found.append(_look(engine, model, plain))
    recipes.train(engine, model, recipes.Record(), RECIPE, world)
    found.append(_look(engine, model, plain))
    engine.close()
    engine.close()
    return found


def _look(engine: Any, model: Any, plain: Any) -> tuple[float, list[int]]:
    model.eval()
    with torch.no_grad(), engine.autocast():
        loss = float(model(input_ids=BATCH, labels=BATCH).loss)
        tokens = plain.generate(BATCH[:1, :4], max_new_tokens=4, do_sample=False, synced_gpus=False)
    model.train()
    return loss, tokens[0].tolist()


@pytest.fixture(scope="module")
def alone() -> list[tuple[float, list[int]]]:
    return run_ranks(1, _evaluate_around_training, ("single",))[0]["single"]


@pytest.fixture(scope="module")
def together() -> list[dict[str, Any]]:
    return run_ranks(2, _evaluate_around_training, SPANNING)


@pytest.mark.parametrize("engine", SPANNING)
def test_evaluation_and_generation_equal_those_of_one_process(
    engine: str, alone: Any, together: Any
) -> None:
    for rank in together:
        for (loss, tokens), (expected_loss, expected_tokens) in zip(
            rank[engine], alone, strict=True
        ):
            assert loss == pytest.approx(expected_loss, rel=1e-6)
            assert tokens == expected_tokens


def _hybrid(world: RankInfo) -> Any:
    record = recipes.run(world, "fsdp", Recipe(steps=3), shard=2)
    engine, model, fresh = recipes.prepare("fsdp", Recipe(steps=2), world, shard=2)
    recipes.train(engine, model, fresh, Recipe(steps=2), world)
    covered = recipes.snapshot(engine, world).covered.values()
    return record, all(bool((count == 1).all()) for count in covered)


def test_hybrid_sharding_trains_as_one_process_and_owns_each_element_once() -> None:
    expected = run_ranks(1, recipes.run, "single", Recipe(steps=3))[0]
    ranks = run_ranks(4, _hybrid)

    losses = [sum(shares) for shares in zip(*(record.losses for record, _ in ranks), strict=True)]
    assert losses == pytest.approx(expected.losses, rel=1e-6)
    assert ranks[0][0].norms == pytest.approx(expected.norms, rel=1e-6)
    assert all(tiled for _, tiled in ranks)


@pytest.mark.parametrize("engine", ["fsdp", "zero1", "zero3"])
def test_a_sharded_engine_works_in_one_process(engine: EngineName) -> None:
    expected = run_ranks(1, recipes.run, "single", RECIPE)[0]
    found = run_ranks(1, recipes.run, engine, RECIPE)[0]

    assert found.losses == pytest.approx(expected.losses, rel=1e-6)


def _gather_one(world: RankInfo, engines: tuple[EngineName, ...]) -> dict[str, Any]:
    found = {}
    for name in engines:
        engine, model, _ = recipes.prepare(name, RECIPE, world)
        plain = getattr(model, "module", model)
        layer = plain.model.layers[0].mlp.up_proj
        with engine.gathered([layer.weight]):
            found[name] = layer.weight.detach().clone()
        engine.close()
    return found


def test_gathered_parameters_are_whole_on_every_rank() -> None:
    expected = dict(recipes.make_model(RECIPE).named_parameters())
    for rank in run_ranks(2, _gather_one, SPANNING):
        for weight in rank.values():
            assert torch.equal(weight, expected["model.layers.0.mlp.up_proj.weight"])
