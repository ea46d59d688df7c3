"""An engine's state is named pieces that any other engine goes on from."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bigtrain.engine.protocol import BUFFER, WEIGHT
from bigtrain.topology import RankInfo
from bigtrain.translate.config import EngineName
from tests.engine import recipes
from tests.engine.harness import run_ranks
from tests.engine.recipes import SPANNING, MemorySource, Recipe

RECIPE = Recipe(steps=3, frozen=("layers.0.mlp",))
MORE = Recipe(steps=2, frozen=("layers.0.mlp",))
NEXT = dict(zip(SPANNING, [*SPANNING[1:], SPANNING[0]], strict=True))


def _train_and_go_on(world: RankInfo, name: EngineName) -> tuple[MemorySource, list[float]]:
    engine, model, record = recipes.prepare(name, RECIPE, world)
    recipes.train(engine, model, record, RECIPE, world)
    saved = recipes.snapshot(engine, world)
    record.losses.clear()
    recipes.train(engine, model, record, MORE, world)
    engine.close()
    return saved, record.losses


def _load_and_go_on(
    world: RankInfo, name: EngineName, saved: MemorySource
) -> tuple[MemorySource, list[float]]:
    engine, model, record = recipes.prepare(name, RECIPE, world, seed=7)
    engine.load_local_state(saved, optimizer=True)
    loaded = recipes.snapshot(engine, world)
    recipes.train(engine, model, record, MORE, world)
    engine.close()
    return loaded, record.losses


def _resume_matrix(world: RankInfo, from_single: MemorySource) -> dict[tuple[str, str], Any]:
    found: dict[tuple[str, str], Any] = {}
    saved = {}
    for name in SPANNING:
        saved[name], losses = _train_and_go_on(world, name)
        found[name, name] = saved[name], losses
    for name in SPANNING:
        for source, state in (
            (f"{name} again", saved[name]),
            (f"before {name}", saved[_before(name)]),
            ("single", from_single),
        ):
            found[source, name] = _load_and_go_on(world, name, state)
    return found


def _before(name: str) -> EngineName:
    return next(earlier for earlier, later in NEXT.items() if later == name)


@pytest.fixture(scope="module")
def single() -> tuple[MemorySource, list[float]]:
    return run_ranks(1, _train_and_go_on, "single")[0]


@pytest.fixture(scope="module")
def matrix(single: Any) -> list[dict[tuple[str, str], Any]]:
    return run_ranks(2, _resume_matrix, single[0])


def differing(ours: MemorySource, theirs: MemorySource) -> list[tuple[str, str]]:
    keys = ours.tensors.keys() | theirs.tensors.keys()
    return [
        key
        for key in sorted(keys)
        if key not in ours.tensors
        or key not in theirs.tensors
        or not torch.equal(ours.tensors[key], theirs.tensors[key])
    ]


@pytest.mark.parametrize("engine", SPANNING)
def test_the_owned_pieces_tile_every_tensor_once(engine: str, single: Any, matrix: Any) -> None:
    state: MemorySource = matrix[0][engine, engine][0]

    assert state.tensors.keys() == single[0].tensors.keys()
    assert all(bool((covered == 1).all()) for covered in state.covered.values())
    trained = {name for name, kind in state.tensors if kind == "exp_avg"}
    assert trained == {
        name
        for name, parameter in recipes.make_model(RECIPE).named_parameters()
        if parameter.requires_grad
    }


@pytest.mark.parametrize("engine", SPANNING)
def test_the_same_engine_goes_on_to_the_last_bit(engine: str, matrix: Any) -> None:
    for rank in matrix:
        saved, losses = rank[engine, engine]
        loaded, resumed_losses = rank[f"{engine} again", engine]
        assert differing(loaded, saved) == []
        assert resumed_losses == losses


@pytest.mark.parametrize("engine", SPANNING)
def test_another_engine_goes_on_from_the_same_state(engine: str, single: Any, matrix: Any) -> None:
    saved, _ = matrix[0][_before(engine), _before(engine)]
    for source, state in ((f"before {engine}", saved), ("single", single[0])):
        loaded = matrix[0][source, engine][0]
        shares = zip(*(rank[source, engine][1] for rank in matrix), strict=True)
        losses = [sum(pair) for pair in shares]
        assert differing(loaded, state) == []
        assert losses == pytest.approx(single[1], rel=1e-6)


@pytest.mark.parametrize("engine", SPANNING)
def test_one_process_goes_on_from_what_two_wrote(engine: str, single: Any, matrix: Any) -> None:
    saved: MemorySource = matrix[0][engine, engine][0]
    loaded, losses = run_ranks(1, _load_and_go_on, "single", saved)[0]

    assert differing(loaded, saved) == []
    assert losses == pytest.approx(single[1], rel=1e-6)


@pytest.mark.parametrize("engine", SPANNING)
def test_groups_keep_their_own_hyperparameters(engine: str, single: Any, matrix: Any) -> None:
    groups = matrix[0]["single", engine][0].param_groups

    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
    assert [group["params"] for group in groups] == [g["params"] for g in single[0].param_groups]


def test_names_and_kinds_are_those_of_the_plain_model(single: Any) -> None:
    model = recipes.make_model(RECIPE)
    kinds = {kind for _, kind in single[0].tensors}

    assert kinds - {BUFFER} == {WEIGHT, "exp_avg", "exp_avg_sq", "step"}
    assert {name for name, kind in single[0].tensors if kind == WEIGHT} == {
        name for name, _ in model.named_parameters()
    }
