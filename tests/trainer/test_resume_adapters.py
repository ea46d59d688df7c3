"""A training of adapters beside frozen weights goes on, on every engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bigtrain.topology import RankInfo
from tests.engine import harness
from tests.trainer.samples import Sentences, losses, tiny_llama, trainer

peft = pytest.importorskip("peft")

ENGINES: dict[str, dict[str, Any]] = {
    "ddp": {},
    "fsdp": {"fsdp": "full_shard"},
    "zero2": {"deepspeed": {"zero_optimization": {"stage": 2}}},
    "zero3": {"deepspeed": {"zero_optimization": {"stage": 3}}},
}


def train(
    world: RankInfo, folder: Path, resume: str | None, engine: dict[str, Any]
) -> tuple[int, list[tuple[float, float]]]:
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.0)
    run = trainer(
        folder,
        data=Sentences(60),
        model=peft.get_peft_model(tiny_llama(), config),
        max_steps=4,
        learning_rate=1e-2,
        save_strategy="steps",
        save_steps=2,
        logging_steps=1,
        gradient_accumulation_steps=1,
        per_device_train_batch_size=12 // world.world_size,
        **engine,
    )
    run.train(resume_from_checkpoint=resume)
    return run._initial_global_step, losses(run)


CROSSINGS = [("fsdp", 2, "fsdp", 2), ("fsdp", 2, "zero3", 3), ("zero2", 2, "ddp", 1)]
MORE = [("ddp", 2, "fsdp", 2), ("zero3", 2, "fsdp", 3), ("zero3", 2, "zero3", 2)]


@pytest.mark.parametrize(
    ("writer", "ranks", "reader", "size"),
    [*CROSSINGS, *(pytest.param(*each, marks=pytest.mark.slow) for each in MORE)],
)
def test_adapters_go_on(tmp_path: Path, writer: str, ranks: int, reader: str, size: int) -> None:
    _, whole = harness.run_ranks(ranks, train, tmp_path, None, ENGINES[writer])[0]
    path = str(tmp_path / "checkpoint-2")
    step, found = harness.run_ranks(size, train, tmp_path / "rest", path, ENGINES[reader])[0]
    assert step == 2
    assert whole[2] != whole[3]
    if (writer, ranks) == (reader, size):
        assert found == whole
    else:
        for ours, theirs in zip(found[2:], whole[2:], strict=True):
            assert ours == pytest.approx(theirs, rel=1e-5)
