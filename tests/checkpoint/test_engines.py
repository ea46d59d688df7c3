"""Every engine's checkpoint is gone on from by every other, at another number of ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from bigtrain.checkpoint.find import find_checkpoint
from bigtrain.checkpoint.load import open_checkpoint
from bigtrain.checkpoint.manifest import Progress
from bigtrain.checkpoint.save import save_checkpoint
from bigtrain.engine.protocol import Engine
from bigtrain.topology import RankInfo
from bigtrain.translate.config import EngineName
from tests.engine import recipes
from tests.engine.harness import run_ranks
from tests.engine.recipes import SPANNING, Recipe

RECIPE = Recipe(steps=2, frozen=("layers.0.mlp",))


def save_engine(world: RankInfo, name: EngineName, output_dir: Path) -> dict[Any, torch.Tensor]:
    """Train, save and go on holding what was saved, whole."""
    engine, model, record = recipes.prepare(name, RECIPE, world)
    recipes.train(engine, model, record, RECIPE, world)
    save_checkpoint(
        output_dir / f"{name}-{world.world_size}" / "checkpoint-2",
        engine=engine,
        world=world,
        run_id=name,
        progress=Progress(step=2),
        scheduler_state={"last_epoch": 2},
        rng_state={"cpu": torch.random.get_rng_state()},
        write_files=lambda staging: write_model(engine, staging),
    )
    saved = recipes.snapshot(engine, world)
    engine.close()
    return saved.tensors


def write_model(engine: Engine, staging: Path) -> None:
    from safetensors.torch import save_file

    if not engine.is_sharded:
        weights = {name: value for name, value in engine.full_weights() if value is not None}
        save_file(weights, staging / "model.safetensors", metadata={"format": "pt"})


def load_engine(world: RankInfo, name: EngineName, checkpoint: Path) -> dict[Any, torch.Tensor]:
    engine, _, _ = recipes.prepare(name, RECIPE, world, seed=7)
    with open_checkpoint(checkpoint) as loaded:
        engine.load_local_state(loaded.source, optimizer=True)
        groups = loaded.source.param_groups
    found = recipes.snapshot(engine, world)
    assert [set(group["params"]) for group in engine.param_groups() if group["params"]] == [
        set(group["params"]) for group in groups or () if group["params"]
    ]
    engine.close()
    return found.tensors


def save_all(world: RankInfo, output_dir: Path) -> dict[str, dict[Any, torch.Tensor]]:
    return {name: save_engine(world, name, output_dir) for name in SPANNING}


def load_all(world: RankInfo, output_dir: Path, written: list[str]) -> dict[Any, Any]:
    names: tuple[EngineName, ...] = SPANNING if world.world_size > 1 else ("single",)
    return {
        (reader, writer): load_engine(world, reader, output_dir / writer / "checkpoint-2")
        for reader in names
        for writer in written
    }


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    output_dir = tmp_path_factory.mktemp("engines")
    saved = {f"{k}-2": v for k, v in run_ranks(2, save_all, output_dir)[0].items()}
    saved["single-1"] = run_ranks(1, save_engine, "single", output_dir)[0]
    for name in saved:
        assert find_checkpoint(output_dir / name, deep=True).path is not None
    return output_dir, saved


@pytest.mark.parametrize("world_size", [1, 2, pytest.param(3, marks=pytest.mark.slow)])
def test_every_engine_reads_what_every_engine_wrote(
    written: tuple[Path, dict[str, Any]], world_size: int
) -> None:
    output_dir, saved = written
    loaded = run_ranks(world_size, load_all, output_dir, list(saved))[0]
    for (reader, writer), tensors in loaded.items():
        differing = [
            key
            for key in tensors.keys() | saved[writer].keys()
            if key not in tensors
            or key not in saved[writer]
            or not torch.equal(tensors[key], saved[writer][key])
        ]
        assert not differing, (reader, writer, sorted(differing)[:5])
