"""Models whose `forward(**kwargs)` swallows the count of items: their losses stay averages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import T5Config, T5ForConditionalGeneration

from bigtrain.topology import RankInfo
from bigtrain.trainer.items import WatchedCount
from tests.engine.harness import run_ranks
from tests.trainer.samples import LENGTH, VOCABULARY, losses, tiny_llama, trainer


class Pairs(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """Every row has as many labels, so that a mean of means is the mean."""

    def __init__(self, count: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.rows = torch.randint(1, VOCABULARY, (count, LENGTH), generator=generator)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.rows[index], "labels": self.rows[index].flip(0)}


def tiny_t5() -> T5ForConditionalGeneration:
    torch.manual_seed(0)
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 1, "num_heads": 4}
    return T5ForConditionalGeneration(
        T5Config(vocab_size=VOCABULARY, dropout_rate=0.0, decoder_start_token_id=0, **sizes)
    )


def _train(world: RankInfo, folder: str, batch: int, changed: dict[str, Any]) -> Any:
    run = trainer(
        folder,
        model=tiny_t5(),
        data=Pairs(32),
        eval_dataset=Pairs(8),
        per_device_train_batch_size=batch,
        max_steps=3,
        **changed,
    )
    run.train()
    return losses(run), run.evaluate()["eval_loss"]


ALIKE = [
    pytest.param(2, 4, {}, id="ddp"),
    pytest.param(2, 4, {"fsdp": "full_shard"}, id="fsdp", marks=pytest.mark.slow),
    pytest.param(
        2, 4, {"deepspeed": {"zero_optimization": {"stage": 3}}}, id="zero3", marks=pytest.mark.slow
    ),
]


@pytest.fixture(scope="module")
def at_once(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return run_ranks(1, _train, str(tmp_path_factory.mktemp("alone")), 8, {})[0]


@pytest.mark.parametrize(("ranks", "batch", "changed"), ALIKE)
def test_its_loss_is_not_multiplied_by_the_ranks(
    tmp_path: Path, at_once: Any, ranks: int, batch: int, changed: dict[str, Any]
) -> None:
    found, evaluated = run_ranks(ranks, _train, str(tmp_path), batch, changed)[0]
    torch.testing.assert_close(torch.tensor(found), torch.tensor(at_once[0]), rtol=2e-4, atol=1e-5)
    assert evaluated == pytest.approx(at_once[1], rel=1e-4)


def test_it_is_said_once_and_a_model_that_counts_is_left_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    swallows = trainer(
        tmp_path, model=tiny_t5(), data=Pairs(16), max_steps=2, gradient_accumulation_steps=2
    )
    counts = trainer(tmp_path, max_steps=2, gradient_accumulation_steps=2)
    swallows.train()
    counts.train()
    said = [text for text in caplog.messages if "takes num_items_in_batch and leaves" in text]
    assert len(said) == 1 and said[0].startswith("T5ForConditionalGeneration")
    averaged = tiny_t5()
    averaged.accepts_loss_kwargs = False
    mean = trainer(
        tmp_path, model=averaged, data=Pairs(16), max_steps=2, gradient_accumulation_steps=2
    )
    mean.train()
    assert losses(swallows)[0][0] == pytest.approx(2 * losses(mean)[0][0], rel=1e-6)


def test_a_count_that_was_carried_about_is_not_used_until_it_is_computed_with() -> None:
    count = WatchedCount.of(torch.tensor(4.0))
    carried = count.to(torch.float64).detach()
    assert not count.was_used
    quotient = torch.tensor(8.0, dtype=torch.float64) / carried
    assert count.was_used and type(quotient) is torch.Tensor and quotient == 2


def test_the_loss_of_a_watched_step_has_the_same_bits() -> None:
    model, row = tiny_llama(), torch.arange(LENGTH)[None]
    plain, watched = (
        model(input_ids=row, labels=row, num_items_in_batch=count).loss
        for count in (torch.tensor(7.0), WatchedCount.of(torch.tensor(7.0)))
    )
    assert torch.equal(plain, watched) and type(watched) is torch.Tensor
