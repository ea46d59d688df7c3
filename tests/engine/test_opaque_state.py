"""What an optimizer keeps that is not one number per element: every rank gets back its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bigtrain.checkpoint.load import open_checkpoint, restore
from bigtrain.checkpoint.manifest import Progress
from bigtrain.checkpoint.save import save_checkpoint
from bigtrain.engine import build_engine
from bigtrain.topology import RankInfo
from bigtrain.translate.config import EngineName
from tests.checkpoint.matrix import write_model
from tests.engine import recipes
from tests.engine.harness import run_ranks
from tests.engine.recipes import Recipe

RECIPE = Recipe()


class Blockwise(torch.optim.Optimizer):
    """Keeps three numbers for each parameter, as quantised optimizers keep one for each block."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 1e-3})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self.state[parameter].setdefault("absmax", torch.arange(3.0))
                    with torch.no_grad():
                        parameter -= group["lr"] * parameter.grad


def train_and_save(world: RankInfo, name: EngineName, target: Path) -> list[float]:
    engine = build_engine(
        recipes.engine_config(name, world_size=world.world_size), world=world, device=recipes.CPU
    )
    model: Any = engine.construct(
        lambda: recipes.make_model(RECIPE), lambda: recipes.make_skeleton(RECIPE)
    )
    wrapped = engine.prepare(model, Blockwise(model.parameters()))
    tokens = torch.ones(1, 4, dtype=torch.int64)
    with engine.accumulating(last=True):
        loss: Tensor = wrapped(input_ids=tokens).logits.float().mean()
        engine.backward(loss)
    engine.step(1.0)
    save_checkpoint(
        target,
        engine=engine,
        world=world,
        run_id="run",
        progress=Progress(step=1),
        scheduler_state=None,
        rng_state={"cpu": torch.random.get_rng_state()},
        write_files=lambda staging: write_model(engine, staging),
    )
    optimizer: Any = engine.optimizer
    optimizer.state.clear()
    with open_checkpoint(target) as loaded:
        restore(engine, loaded, world=world)
    return [float(state["absmax"].sum()) for state in optimizer.state.values()]


@pytest.mark.parametrize("name", ["ddp", "fsdp", "zero2", "zero3"])
def test_each_rank_gets_back_its_own(tmp_path: Path, name: EngineName) -> None:
    for found in run_ranks(2, train_and_save, name, tmp_path / "checkpoint-1"):
        assert found
        assert set(found) == {3.0}
