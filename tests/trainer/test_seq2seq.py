"""Seq2SeqTrainer: evaluation by what the model generates, in step on every engine."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor
from torch.utils.data import Dataset
from transformers import GenerationConfig, T5Config, T5ForConditionalGeneration

from bigtrain.errors import UnsupportedError
from bigtrain.topology import RankInfo
from bigtrain.trainer.seq2seq import Seq2SeqTrainer, Seq2SeqTrainingArguments
from tests.engine.harness import run_ranks
from tests.trainer.samples import arguments, history

LENGTH = 6
ENGINES: dict[str, dict[str, Any]] = {
    "ddp": {},
    "fsdp": {"fsdp": "full_shard"},
    "zero3": {"deepspeed": {"zero_optimization": {"stage": 3}}},
}


class Pairs(Dataset[dict[str, Tensor]]):
    """Questions of one length and answers of another."""

    def __init__(self, count: int) -> None:
        generator = torch.Generator().manual_seed(1)
        self.questions = torch.randint(2, 32, (count, 7), generator=generator)
        self.answers = torch.randint(2, 32, (count, 5), generator=generator)

    def __len__(self) -> int:
        return len(self.questions)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.questions[index], "labels": self.answers[index]}


def tiny_t5() -> T5ForConditionalGeneration:
    config = T5Config(
        vocab_size=32,
        d_model=16,
        d_kv=8,
        d_ff=32,
        num_layers=2,
        num_heads=2,
        dropout_rate=0.0,
        decoder_start_token_id=0,
        pad_token_id=0,
        eos_token_id=1,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return T5ForConditionalGeneration(config)


def exact(prediction: Any) -> dict[str, float]:
    tokens, labels = prediction.predictions, prediction.label_ids
    return {"rows": len(tokens), "sum": int(tokens.sum()), "labels": len(labels)}


def seq2seq(
    folder: Path | str, *, kind: Any = Seq2SeqTrainer, questions: int = 7, **changed: Any
) -> Any:
    theirs = kind is transformers.Seq2SeqTrainer
    fields = {
        "kind": transformers.Seq2SeqTrainingArguments if theirs else Seq2SeqTrainingArguments,
        "predict_with_generate": True,
        "generation_max_length": LENGTH,
        "num_train_epochs": 1,
        "per_device_eval_batch_size": 2,
    } | changed
    return kind(
        model=tiny_t5(),
        args=arguments(folder, **fields),
        train_dataset=Pairs(8),
        eval_dataset=Pairs(questions),
        compute_metrics=exact,
    )


def test_training_and_generation_equal_transformers(tmp_path: Path) -> None:
    runs = []
    for kind in (Seq2SeqTrainer, transformers.Seq2SeqTrainer):
        # transformers counts a short last batch as a whole one, so there is none.
        run = seq2seq(
            tmp_path, kind=kind, questions=6, eval_strategy="epoch", generation_num_beams=2
        )
        run.train()
        runs.append((history(run), run.predict(Pairs(3)).predictions))
    (ours, tokens), (theirs, their_tokens) = runs
    assert ours == theirs
    width = tokens.shape[1]
    assert np.array_equal(tokens, their_tokens[:, :width]) and not their_tokens[:, width:].any()


def test_labels_are_smoothed_as_in_transformers(tmp_path: Path) -> None:
    figures = [
        seq2seq(tmp_path, kind=kind, questions=6, label_smoothing_factor=0.2).evaluate()[
            "eval_loss"
        ]
        for kind in (Seq2SeqTrainer, transformers.Seq2SeqTrainer)
    ]
    assert figures[0] == figures[1]


@pytest.mark.parametrize("returned", [1, 3])
def test_every_sample_keeps_all_its_sequences(tmp_path: Path, returned: int) -> None:
    config = GenerationConfig(
        max_new_tokens=4, num_beams=3, num_return_sequences=returned, decoder_start_token_id=0
    )
    metrics = seq2seq(tmp_path).evaluate(generation_config=config)
    assert metrics["eval_rows"] == 7 * returned


def test_without_generation_logits_are_predicted(tmp_path: Path) -> None:
    run = seq2seq(tmp_path, predict_with_generate=False)
    run.compute_metrics = None
    assert run.predict(Pairs(3)).predictions[0].shape == (3, 5, 32)


def test_a_generation_config_that_contradicts_itself_is_refused_at_once(tmp_path: Path) -> None:
    bad = GenerationConfig(do_sample=False, top_p=0.9)
    with pytest.raises(ValueError, match="top_p"):
        seq2seq(tmp_path, generation_config=bad)


def test_sortish_sampler_is_refused_with_what_does_it(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="group_by_length"):
        seq2seq(tmp_path, sortish_sampler=True)


def test_plain_arguments_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="Seq2SeqTrainingArguments"):
        Seq2SeqTrainer(model=tiny_t5(), args=arguments(tmp_path))


@dataclass(frozen=True, kw_only=True)
class Outcome:
    metrics: dict[str, float]
    rows: list[list[int]]


def _evaluate(world: RankInfo, folder: str, changed: dict[str, Any]) -> Outcome:
    """7 samples in batches of 2 on 2 ranks: the last batch is filled up with repeated ones."""
    run = seq2seq(folder, **changed)
    run.train()
    metrics = run.evaluate()
    kept = ("eval_loss", "eval_rows", "eval_labels", "eval_sum")
    rows = run.predict(Pairs(5)).predictions.tolist()
    return Outcome(metrics={name: metrics[name] for name in kept}, rows=rows)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    folder = str(tmp_path_factory.mktemp("alone"))
    changed = {"per_device_train_batch_size": 8, "per_device_eval_batch_size": 4}
    return run_ranks(1, _evaluate, folder, changed)[0]


@pytest.mark.parametrize("name", ENGINES)
def test_ranks_generate_in_step_on_uneven_sets(tmp_path: Path, name: str, alone: Outcome) -> None:
    ranks = run_ranks(2, _evaluate, str(tmp_path), ENGINES[name])
    assert ranks[0] == ranks[1]
    ours, expected = ranks[0].metrics, alone.metrics
    # The last batch's mean has a repeated sample in it, here and in transformers.
    assert ours.pop("eval_loss") == pytest.approx(expected["eval_loss"], rel=1e-2)
    assert ours == {name: expected[name] for name in ours}
    assert ranks[0].rows == alone.rows
