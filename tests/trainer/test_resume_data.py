"""Going on in the middle of an epoch: the same samples, the same numbers, nothing loaded twice."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback
from transformers.testing_utils import CaptureLogger
from transformers.utils import logging

from bigtrain.errors import CheckpointError
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


# ---- Where the steps alone don't tell ----

PASS = 4  # steps that the stream below is long, and one more that is half full


@pytest.mark.parametrize("saved_at", [3, 5, 7, 10])
def test_data_read_in_several_passes_goes_on_within_its_pass(tmp_path: Path, saved_at: int) -> None:
    runs = []
    for resume in (None, str(tmp_path / f"checkpoint-{saved_at}")):
        run = trainer(
            tmp_path,
            data=Stream(4 * PASS + 2),
            max_steps=13,
            save_strategy="steps",
            save_steps=saved_at,
        )
        run.train(resume_from_checkpoint=resume)
        runs.append((losses(run), run.state.epoch))
    assert runs[0] == runs[1] and runs[0][1] > 2


def test_a_stream_goes_on_behind_its_last_step_when_more_are_asked_for(tmp_path: Path) -> None:
    straight = trainer(tmp_path / "a", data=Stream(40), max_steps=6, lr_scheduler_type="constant")
    straight.train()
    fields = {"lr_scheduler_type": "constant", "save_strategy": "steps", "save_steps": 3}
    trainer(tmp_path / "b", data=Stream(40), max_steps=3, **fields).train()
    longer = trainer(tmp_path / "b", data=Stream(40), max_steps=6, **fields)
    longer.train(resume_from_checkpoint=True)
    assert losses(longer) == losses(straight) and len(losses(longer)) == 6


@pytest.mark.parametrize(("saved_at", "left"), [(4, 12), (8, 8), (6, 10)])
def test_another_batch_size_goes_on_behind_the_samples_that_were_seen(
    tmp_path: Path, saved_at: int, left: int
) -> None:
    fields = {"save_strategy": "steps", "train_sampling_strategy": "sequential"}
    first = trainer(tmp_path, data=Sentences(32), save_steps=saved_at, max_steps=saved_at, **fields)
    first.train()
    data = Sentences(32)
    wider = trainer(
        tmp_path, data=data, per_device_train_batch_size=2, num_train_epochs=2, **fields
    )
    wider.train(resume_from_checkpoint=True)
    assert data.loaded == [*range(saved_at * 4 % 32, 32), *range(32)][: 64 - saved_at * 4]
    assert len(data.loaded) == 4 * left


class StopAt(TrainerCallback):
    """Ends the training, as for this test, after a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step == self.step


@pytest.mark.parametrize(
    ("sizes", "saved_at", "asked", "steps", "epoch"),
    [
        ((4, 8), 4, {"num_train_epochs": 2}, 10, 2),
        ((4, 8), 8, {"num_train_epochs": 2}, 12, 2),
        ((8, 4), 2, {"num_train_epochs": 2}, 14, 2),
        ((8, 4), 2, {"num_train_epochs": 1.5}, 10, 1.5),
        ((4, 8), 6, {"num_train_epochs": 1}, 7, 1),
        ((8, 4), 2, {"max_steps": 12}, 12, 1.75),
        ((4, 8), 4, {"max_steps": 12}, 12, 2.5),
        ((4, 16), 6, {"max_steps": 8}, 8, 1.5),
    ],
)
def test_another_batch_size_ends_where_the_data_or_the_steps_that_were_asked_for_do(
    tmp_path: Path,
    sizes: tuple[int, int],
    saved_at: int,
    asked: dict[str, Any],
    steps: int,
    epoch: float,
) -> None:
    ran = []
    for size, resume, stop in [
        (sizes[0], None, saved_at),
        (sizes[1], f"checkpoint-{saved_at}", None),
        (sizes[1], f"checkpoint-{saved_at + 1}", None),  # which has steps of both sizes behind it
    ]:
        data = Sentences(32)
        run = trainer(
            tmp_path,
            data=data,
            per_device_train_batch_size=size,
            save_strategy="steps",
            save_steps=1,
            train_sampling_strategy="sequential",
            callbacks=[] if stop is None else [StopAt(stop)],
            **asked,
        )
        run.train(resume_from_checkpoint=resume and str(tmp_path / resume))
        ran.append((run, data.loaded))
    _, whole, rest = ran

    size = sizes[1]
    begin = saved_at * sizes[0] // size * size
    for (run, loaded), start in ((whole, begin), (rest, begin + size)):
        assert run.state.global_step == run.state.max_steps == steps
        assert run.state.epoch == epoch
        assert run.lr_scheduler.get_last_lr() == [0.0, 0.0]
        trained = [index % 32 for index in range(start, int(32 * epoch))]
        # A loader reads a batch ahead, also of the last one.
        assert loaded[: len(trained)] == trained and len(loaded) <= len(trained) + size
    assert losses(rest[0]) == losses(whole[0])


def test_a_stream_in_smaller_batches_ends_after_the_steps_that_were_asked_for(
    tmp_path: Path,
) -> None:
    fields = {"save_strategy": "steps", "save_steps": 3, "lr_scheduler_type": "constant"}
    trainer(tmp_path, data=Stream(200), max_steps=6, **fields).train()
    rest = trainer(tmp_path, data=Stream(200), max_steps=8, per_device_train_batch_size=2, **fields)
    rest.train(resume_from_checkpoint=True)
    assert rest.state.global_step == 8
    # Behind 24 samples, and without beginning the data again.
    straight = trainer(
        tmp_path / "b", data=Stream(200), max_steps=14, per_device_train_batch_size=2, **fields
    )
    straight.train()
    assert rest._samples_seen == straight._samples_seen == 28
    assert rest.state.epoch is not None and rest.state.epoch <= 1


# ---- An edited state ----


def _edit_state(checkpoint: Path, **changed: Any) -> None:
    path = checkpoint / "trainer_state.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changed, indent=4))


@pytest.mark.parametrize("resume", [True, "checkpoint-4"])
def test_an_edited_trainer_state_counts_and_is_named(
    tmp_path: Path, resume: bool | str, caplog: pytest.LogCaptureFixture
) -> None:
    fields: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2}
    trainer(tmp_path, max_steps=4, **fields).train()
    _edit_state(tmp_path / "checkpoint-4", best_metric=0.25)
    run = trainer(tmp_path, max_steps=6, **fields)
    run.train(resume_from_checkpoint=resume if resume is True else str(tmp_path / str(resume)))
    assert (run.state.best_metric, len(losses(run))) == (0.25, 6)
    assert "checkpoint-4/trainer_state.json: was edited after it was saved" in caplog.text


def test_one_flipped_bit_of_it_is_no_edit_unless_the_checkpoint_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fields: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    trainer(tmp_path, **fields).train()
    path = tmp_path / "checkpoint-4" / "trainer_state.json"
    text = path.read_text()
    path.write_text(text.replace('"max_steps": 4', '"max_steps": 5'))
    assert path.read_text() != text
    run = trainer(tmp_path, **fields)
    run.train(resume_from_checkpoint=True)
    assert run._initial_global_step == 2
    assert "trainer_state.json: one bit of it is not as it was written" in caplog.text
    run = trainer(tmp_path, **fields)
    run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert run._initial_global_step == 4


def test_a_trainer_state_that_is_none_any_more_is_refused(tmp_path: Path) -> None:
    fields: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    trainer(tmp_path, **fields).train()
    _edit_state(tmp_path / "checkpoint-4", steps_of_mine=1)
    with pytest.raises(CheckpointError, match=r"trainer_state\.json is no trainer's state"):
        trainer(tmp_path, **fields).train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    (tmp_path / "checkpoint-4" / "trainer_state.json").write_text('{"global_step": ')
    with pytest.raises(CheckpointError, match=r"trainer_state\.json"):
        trainer(tmp_path, **fields).train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    run = trainer(tmp_path, **fields)
    run.train(resume_from_checkpoint=True)
    assert len(losses(run)) == 4


def test_weights_beside_an_edited_state_are_still_checked(tmp_path: Path) -> None:
    fields: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2, "max_steps": 2}
    trainer(tmp_path, **fields).train()
    checkpoint = tmp_path / "checkpoint-2"
    _edit_state(checkpoint, best_metric=0.25)
    weights = bytearray((checkpoint / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (checkpoint / "model.safetensors").write_bytes(weights)
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        trainer(tmp_path, **fields).train(resume_from_checkpoint=str(checkpoint))
