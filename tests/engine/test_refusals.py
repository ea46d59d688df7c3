"""What an engine can't do ends in one clear message."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from bigtrain.engine import build_engine
from bigtrain.errors import BigtrainError, CheckpointError, ConfigError, UnsupportedError
from bigtrain.topology import RankInfo
from tests.engine import recipes
from tests.engine.harness import run_ranks
from tests.engine.recipes import CPU, MemorySource, Recipe

ALONE = RankInfo()


def test_single_refuses_to_be_one_of_several() -> None:
    with pytest.raises(ConfigError, match="but there are 2 .* use engine ddp or fsdp"):
        build_engine(
            recipes.engine_config("single", world_size=1),
            world=RankInfo(world_size=2),
            device=CPU,
        )


def test_deepspeed_refuses_fp16_on_a_cpu() -> None:
    with pytest.raises(UnsupportedError, match="zero2: DeepSpeed has no fp16 on a CPU; use bf16"):
        build_engine(
            recipes.engine_config("zero2", world_size=1, dtype="fp16"), world=ALONE, device=CPU
        )


def test_an_optimizer_of_another_model_is_refused() -> None:
    engine = build_engine(recipes.engine_config("single", world_size=1), world=ALONE, device=CPU)
    other = torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1)
    with pytest.raises(ConfigError, match="2 parameters in the optimizer's group 0 are not the"):
        engine.prepare(nn.Linear(2, 2), other)


def _different_models(world: RankInfo) -> str:
    engine = build_engine(recipes.engine_config("fsdp", world_size=2), world=world, device=CPU)
    try:
        engine.prepare(nn.Linear(2, 2 + world.rank), None)
    except BigtrainError as error:
        return str(error)
    return ""


def test_models_that_differ_over_ranks_are_refused_on_all() -> None:
    for message in run_ranks(2, _different_models):
        assert message.startswith("the model on rank 1 has other parameters than the one on rank 0")


def _prepared(*frozen: str) -> Any:
    engine, _, _ = recipes.prepare("single", Recipe(frozen=frozen), ALONE)
    return engine


def test_a_checkpoint_of_another_shape_is_refused_by_name() -> None:
    engine = _prepared()
    saved = recipes.snapshot(engine, ALONE)
    saved.tensors["model.norm.weight", "weight"] = torch.zeros(7)
    with pytest.raises(CheckpointError, match="weight of 'model.norm.weight' has shape .7,. in"):
        engine.load_local_state(saved, optimizer=False)


def test_a_checkpoint_without_a_tensor_is_refused_by_name() -> None:
    engine = _prepared()
    with pytest.raises(CheckpointError, match="has no weight for 'model.embed_tokens.weight'"):
        engine.load_local_state(MemorySource([], []), optimizer=False)


def test_weights_alone_do_not_pass_for_an_optimizer() -> None:
    engine = _prepared()
    saved = recipes.snapshot(engine, ALONE)
    saved._groups = None
    with pytest.raises(CheckpointError, match="holds weights only"):
        engine.load_local_state(saved, optimizer=True)


def test_other_groups_than_the_checkpoints_are_refused() -> None:
    saved = recipes.snapshot(_prepared(), ALONE)
    with pytest.raises(CheckpointError, match="first 'model.embed_tokens.weight'"):
        _prepared("embed_tokens").load_local_state(saved, optimizer=True)
