"""Going on in the middle of an epoch: the same samples, the same numbers, nothing loaded twice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.testing_utils import CaptureLogger
from transformers.utils import logging

from tests.arguments.rows import Seen
from tests.trainer.samples import Points, Sentences, Stream, arguments, losses, trainer

HALF = 3  # of the six steps of an epoch


class Ragged(Sentences):
    """Sentences of unequal lengths."""

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        sample = super().__getitem__(index)
        return {name: values[: 8 + index % 8] for name, values in sample.items()}


def _padded(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    pad = torch.nn.utils.rnn.pad_sequence
    return {
        "input_ids": pad([row["input_ids"] for row in rows], batch_first=True),
        "labels": pad([row["labels"] for row in rows], batch_first=True, padding_value=-100),
    }


KINDS: dict[str, dict[str, Any]] = {
    "map": {},
    "iterable": {"data": Stream, "max_steps": 9},
    "grouped by length": {
        "data": Ragged,
        "train_sampling_strategy": "group_by_length",
        "data_collator": _padded,
    },
    "workers": {"dataloader_num_workers": 2},
    "iterable and a worker": {"data": Stream, "max_steps": 9, "dataloader_num_workers": 1},
    "accumulation": {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_goes_on_in_mid_epoch_to_the_last_bit(tmp_path: Path, kind: str) -> None:
    runs = []
    for resume in (None, str(tmp_path / f"checkpoint-{HALF}")):
        fields = dict(KINDS[kind])
        data = fields.pop("data", Sentences)(22)
        run = trainer(tmp_path, data=data, save_strategy="steps", save_steps=HALF, **fields)
        run.train(resume_from_checkpoint=resume)
        runs.append(losses(run))
    assert runs[0] == runs[1] and len(runs[0]) > 2 * HALF


def test_seeking_loads_no_sample_that_was_seen(tmp_path: Path) -> None:
    fields: dict[str, Any] = {"save_strategy": "steps", "save_steps": HALF, "num_train_epochs": 1}
    trainer(tmp_path, data=Sentences(22), **fields).train()
    data = Sentences(22)
    rest = trainer(tmp_path, data=data, **fields)
    rest.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{HALF}"))
    assert len(data.loaded) == 22 - 4 * HALF


def test_ignore_data_skip_starts_the_epoch_over(tmp_path: Path) -> None:
    fields: dict[str, Any] = {
        "save_strategy": "steps",
        "save_steps": 2,
        "train_sampling_strategy": "sequential",
    }
    trainer(tmp_path, model=Seen(), data=Points(16), **fields).train()
    rest = trainer(tmp_path, model=Seen(), data=Points(16), ignore_data_skip=True, **fields)
    rest.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    first = [round(float(Points(16)[index]["x"][0]), 4) for index in range(4)]
    assert rest.model.rows[:4] == first


def test_arguments_that_differ_are_listed_with_which_counts(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    logging.set_verbosity_warning()
    # Of the same words transformers warns once in a process, which may have been in another test.
    type(logging.get_logger()).warning_once.cache_clear()  # type: ignore[attr-defined]
    trainer(tmp_path, save_strategy="steps", save_steps=2, max_steps=4).train()
    with CaptureLogger(logging.get_logger()) as theirs:
        rest = trainer(
            tmp_path,
            save_strategy="steps",
            save_steps=3,
            max_steps=6,
            learning_rate=0.5,
            lr_scheduler_type="cosine",
        )
        rest.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    said = caplog.text
    assert "learning_rate: 0.5 now, 0.01 in the checkpoint: the checkpoint's counts" in said
    assert "max_steps: 6 now, 4 in the checkpoint: the new one counts" in said
    assert "lr_scheduler_type: 'cosine' now, 'linear' in the checkpoint: the new one counts" in said
    assert "output_dir" not in said
    assert "save_steps: 3 (from args) != 2 (from trainer_state.json)" in theirs.out
    rates = [e["learning_rate"] for e in rest.state.log_history if "learning_rate" in e]
    assert max(rates) == pytest.approx(arguments(tmp_path).learning_rate)
