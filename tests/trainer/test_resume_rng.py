"""Random numbers after a resume: exact at the same size, else from (seed, step, rank), and said."""

from __future__ import annotations

import logging
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import TrainerCallback

from bigtrain.topology import RankInfo
from bigtrain.trainer import rng
from tests.engine import harness
from tests.trainer.samples import Sentences, tiny_llama, trainer

SAVED_AT = 2


class Draws(TrainerCallback):
    """What the three generators give at the beginning of every step."""

    def __init__(self) -> None:
        self.found: dict[int, tuple[float, float, float]] = {}

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        drawn = random.random(), float(np.random.rand()), float(torch.rand(()))
        self.found[state.global_step] = drawn


class Said(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


def run(
    world: RankInfo, folder: Path, resume: str | None, engine: dict[str, Any]
) -> tuple[dict[int, Any], list[str]]:
    draws, said = Draws(), Said()
    run = trainer(
        folder,
        data=Sentences(60),
        model=tiny_llama(dropout=0.2),
        callbacks=[draws],
        max_steps=SAVED_AT + 2,
        save_strategy="steps",
        save_steps=SAVED_AT,
        gradient_accumulation_steps=1,
        per_device_train_batch_size=12 // world.world_size,
        seed=5,
        **engine,
    )
    logger = logging.getLogger("bigtrain")
    logger.addHandler(said)
    logger.setLevel(logging.INFO)
    run.train(resume_from_checkpoint=resume)
    logger.removeHandler(said)
    return draws.found, said.texts


def expected(rank: int) -> tuple[float, float, float]:
    rng.derive(seed=5, step=SAVED_AT, rank=rank, device=torch.device("cpu"))
    return random.random(), float(np.random.rand()), float(torch.rand(()))


@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_random_numbers_go_on_exactly_or_follow_from_seed_step_and_rank(
    tmp_path: Path, engine: str
) -> None:
    changed: dict[str, Any] = {"fsdp": "full_shard"} if engine == "fsdp" else {}
    whole = harness.run_ranks(2, run, tmp_path, None, changed)
    path = str(tmp_path / f"checkpoint-{SAVED_AT}")
    same = harness.run_ranks(2, run, tmp_path / "same", path, changed)
    for (before, _), (after, texts) in zip(whole, same, strict=True):
        assert after == {step: drawn for step, drawn in before.items() if step >= SAVED_AT}
        assert not any("random numbers go on" in text for text in texts)

    other = harness.run_ranks(3, run, tmp_path / "other", path, changed)
    first = [found[SAVED_AT] for found, _ in other]
    assert first == [expected(rank) for rank in range(3)]
    assert len(set(first)) == 3
    told = "was saved by 2 ranks, this run has 3: random numbers go on from seed 5, step and rank"
    assert [sum(told in text for text in texts) for _, texts in other] == [1, 0, 0]
