"""transformers' Trainer is the oracle: on one process in fp32 every figure is the same bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch.utils.data import DataLoader, SequentialSampler
from transformers import EvalPrediction, TrainerCallback

from bigtrain.trainer.arguments import TrainingArguments
from bigtrain.trainer.trainer import Trainer
from tests.trainer.samples import (
    Points,
    Regression,
    Sentences,
    Stream,
    arguments,
    history,
    same_weights,
    tiny_llama,
    without_clock,
)

Make = Callable[[], Any]
ORACLE = (transformers.Trainer, transformers.TrainingArguments)
OURS = (Trainer, TrainingArguments)


def both(
    folder: Path,
    *,
    model: Make = lambda: tiny_llama(dropout=0.1),
    data: Make = lambda: Sentences(22),
    parameters: Make = dict,
    **changed: Any,
) -> tuple[Any, Any]:
    """The same run by transformers' Trainer and by ours, trained."""
    runs = []
    for name, (trainer_class, arguments_class) in (("theirs", ORACLE), ("ours", OURS)):
        args = arguments(folder / name, kind=arguments_class, **changed)
        run = trainer_class(model=model(), args=args, train_dataset=data(), **parameters())
        run.train()
        runs.append(run)
    return runs[0], runs[1]


def assert_same(theirs: Any, ours: Any) -> None:
    assert history(ours) == history(theirs)
    assert same_weights(ours.model, theirs.model)


@pytest.mark.parametrize(
    "changed",
    [
        pytest.param({}, id="plain"),
        pytest.param({"gradient_accumulation_steps": 3}, id="accumulated, short last window"),
        pytest.param({"num_train_epochs": 1.5}, id="a fraction of an epoch"),
        pytest.param({"max_steps": 9}, id="max_steps across epochs"),
        pytest.param({"label_smoothing_factor": 0.1}, id="label smoothing"),
        pytest.param({"train_sampling_strategy": "group_by_length"}, id="grouped by length"),
        pytest.param({"train_sampling_strategy": "sequential"}, id="sequential"),
        pytest.param({"lr_scheduler_type": "cosine", "warmup_steps": 0.2}, id="cosine"),
        pytest.param({"max_grad_norm": 0.05}, id="much clipping"),
        pytest.param({"max_grad_norm": 0}, id="no clipping"),
        pytest.param({"logging_steps": 4, "logging_first_step": True}, id="logging now and then"),
        pytest.param({"logging_steps": 0.3}, id="logging by share"),
        pytest.param({"logging_strategy": "epoch"}, id="logging by epoch"),
        pytest.param({"optim": "sgd"}, id="another optimizer"),
        pytest.param({"dataloader_drop_last": True}, id="drop last"),
        pytest.param({"dataloader_num_workers": 2}, id="data loader workers"),
        pytest.param({"data_seed": 7, "seed": 3}, id="seeds"),
        pytest.param({"include_num_input_tokens_seen": "all"}, id="tokens seen"),
        pytest.param({"neftune_noise_alpha": 5.0}, id="neftune"),
        pytest.param({"activation_checkpointing": True}, id="activation checkpointing"),
        pytest.param({"average_tokens_across_devices": False}, id="items of this rank"),
    ],
)
def test_a_training_is_the_same_to_the_last_bit(tmp_path: Path, changed: dict[str, Any]) -> None:
    assert_same(*both(tmp_path, **changed))


@pytest.mark.parametrize("accumulation", [1, 3])
def test_a_loss_function_of_the_users_is_the_same(tmp_path: Path, accumulation: int) -> None:
    def summed(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        logits, targets = outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
        loss = torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
        return loss / num_items_in_batch

    assert_same(
        *both(
            tmp_path,
            parameters=lambda: {"compute_loss_func": summed},
            gradient_accumulation_steps=accumulation,
        )
    )


def test_an_iterable_dataset_is_the_same(tmp_path: Path) -> None:
    assert_same(*both(tmp_path, data=lambda: Stream(22), max_steps=9))


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_plain_module_is_the_same(tmp_path: Path, accumulation: int) -> None:
    assert_same(
        *both(
            tmp_path,
            model=Regression,
            data=lambda: Points(22),
            gradient_accumulation_steps=accumulation,
        )
    )


def test_a_loss_that_is_no_number_is_filtered_the_same(tmp_path: Path) -> None:
    class Broken(Points):
        def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
            sample = super().__getitem__(index)
            if index == 3:
                sample["labels"] = torch.tensor(float("nan"))
            return sample

    theirs, ours = both(
        tmp_path, model=Regression, data=lambda: Broken(22), logging_steps=3, max_grad_norm=0
    )
    assert repr(history(ours)) == repr(history(theirs))


def test_a_model_in_float64_is_trained_in_it(tmp_path: Path) -> None:
    theirs, ours = both(tmp_path, model=lambda: tiny_llama().double(), max_steps=3)
    assert_same(theirs, ours)
    assert ours.model.dtype == torch.float64


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    guesses = prediction.predictions.argmax(-1)
    counts = prediction.label_ids != -100
    return {"accuracy": float((guesses == prediction.label_ids)[counts].mean())}


@pytest.mark.parametrize(
    "changed",
    [
        pytest.param({"eval_strategy": "epoch"}, id="every epoch"),
        pytest.param({"eval_strategy": "steps", "eval_steps": 3, "eval_delay": 4}, id="delayed"),
        pytest.param({"eval_strategy": "steps", "eval_steps": 0.25}, id="by share"),
        pytest.param({"eval_strategy": "steps", "eval_on_start": True}, id="on start"),
        pytest.param({"eval_strategy": "epoch", "eval_accumulation_steps": 1}, id="moved to CPU"),
        pytest.param({"eval_strategy": "epoch", "prediction_loss_only": True}, id="loss only"),
        pytest.param({"eval_strategy": "epoch", "eval_do_concat_batches": True}, id="concat"),
        pytest.param(
            {
                "eval_strategy": "epoch",
                "lr_scheduler_type": "reduce_lr_on_plateau",
                "lr_scheduler_kwargs": {"patience": 0},
            },
            id="a schedule that follows the metric",
        ),
    ],
)
def test_evaluation_in_training_is_the_same(tmp_path: Path, changed: dict[str, Any]) -> None:
    def parameters() -> dict[str, Any]:
        return {"eval_dataset": Sentences(11, seed=5), "compute_metrics": accuracy}

    assert_same(*both(tmp_path, parameters=parameters, **changed))


def test_a_dict_of_evaluation_sets_is_the_same(tmp_path: Path) -> None:
    def parameters() -> dict[str, Any]:
        sets = {"short": Sentences(5, seed=5), "long": Sentences(11, seed=6)}
        return {"eval_dataset": sets, "compute_metrics": accuracy}

    theirs, ours = both(tmp_path, parameters=parameters, eval_strategy="epoch")
    assert_same(theirs, ours)
    assert "eval_short_accuracy" in ours.evaluate()


def own_loader(kind: Any) -> Any:
    class OwnLoader(kind):  # type: ignore[misc]
        def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
            return DataLoader(self.eval_dataset, batch_size=3)

    return OwnLoader


def own_sampler(kind: Any) -> Any:
    class OwnSampler(kind):  # type: ignore[misc]
        def _get_eval_sampler(self, eval_dataset: Any) -> Any:
            return SequentialSampler(range(5))

    return OwnSampler


def own_batches(kind: Any) -> Any:
    class OwnBatches(kind):  # type: ignore[misc]
        def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
            return list(DataLoader(self.eval_dataset, batch_size=5))

    return OwnBatches


def with_a_conflict(prediction: EvalPrediction) -> dict[str, float]:
    return {"acc": 1.0, "foo_acc": 2.0, "losses": float(prediction.losses.size)}


@pytest.mark.parametrize("batch_size", [2, 8])
@pytest.mark.parametrize(
    "own", [lambda kind: kind, own_loader, own_sampler, own_batches], ids=lambda own: own.__name__
)
def test_metrics_are_the_same_in_value_and_order(
    tmp_path: Path, own: Callable[[Any], Any], batch_size: int
) -> None:
    found = []
    for kind, of in (ORACLE, OURS):
        fields = {"include_for_metrics": ["loss"], "per_device_eval_batch_size": batch_size}
        run = own(kind)(
            model=tiny_llama(),
            args=arguments(tmp_path, kind=of, **fields),
            eval_dataset=Sentences(12, seed=5),
            compute_metrics=with_a_conflict,
        )
        found.append([run.evaluate(), run.evaluate(metric_key_prefix="foo")])
    theirs, ours = ([list(without_clock(each).items()) for each in one] for one in found)
    assert ours == theirs
    assert [list(each) for each in found[0]] == [list(each) for each in found[1]]


def test_predictions_are_the_same(tmp_path: Path) -> None:
    def guess(logits: Any, labels: Any) -> torch.Tensor:
        return logits.argmax(-1)  # type: ignore[no-any-return]

    theirs, ours = both(
        tmp_path, parameters=lambda: {"preprocess_logits_for_metrics": guess}, max_steps=1
    )
    one, other = (run.predict(Sentences(7, seed=5)) for run in (theirs, ours))
    assert np.array_equal(one.predictions, other.predictions)
    assert np.array_equal(one.label_ids, other.label_ids)
    assert without_clock(one.metrics) == without_clock(other.metrics)


class Recorder(TrainerCallback):
    """Every event, with where the training was."""

    def __init__(self) -> None:
        self.events: list[tuple[Any, ...]] = []

    def __getattribute__(self, name: str) -> Any:
        if not name.startswith("on_"):
            return super().__getattribute__(name)

        def record(args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.events.append((name, state.global_step, state.epoch, sorted(kwargs)))

        return record


def test_events_come_in_the_same_order(tmp_path: Path) -> None:
    recorders = [Recorder(), Recorder()]
    unused = iter(recorders)
    both(
        tmp_path,
        parameters=lambda: {"callbacks": [next(unused)], "eval_dataset": Sentences(6)},
        gradient_accumulation_steps=2,
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=3,
        num_train_epochs=1.5,
    )
    assert recorders[1].events == recorders[0].events


class StopsEarly(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_epoch_stop = state.global_step in (2, 5)
        control.should_training_stop = state.global_step == 7


def test_a_callback_stops_epoch_and_training_as_there(tmp_path: Path) -> None:
    theirs, ours = both(
        tmp_path, parameters=lambda: {"callbacks": [StopsEarly()]}, num_train_epochs=4
    )
    assert_same(theirs, ours)
    assert ours.state.global_step == 7
