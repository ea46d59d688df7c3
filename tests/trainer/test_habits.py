"""What people are used to from transformers' Trainer, beyond names and numbers."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import types
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import safetensors.torch
import torch
import transformers
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset
from transformers import EarlyStoppingCallback, TrainerCallback
from transformers.testing_utils import CaptureLogger
from transformers.utils.import_utils import is_in_notebook

from bigtrain.errors import UnsupportedError
from bigtrain.topology import RankInfo
from bigtrain.trainer.trainer import Trainer
from tests.engine.harness import run_ranks
from tests.trainer.samples import Points, Regression, arguments, history, same_weights, trainer


def regression(folder: Path | str, **changed: Any) -> Trainer:
    changed.setdefault("data", Points(32))
    changed.setdefault("eval_dataset", Points(12))
    return trainer(folder, model=Regression(), **changed)


class PointStream(IterableDataset[dict[str, Tensor]]):
    def __init__(self, count: int) -> None:
        self.points = Points(count)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return (self.points[index] for index in range(len(self.points)))


# ---- accelerator_config ----


def test_the_accelerator_shows_what_its_config_says(tmp_path: Path) -> None:
    config = {
        "split_batches": True,
        "dispatch_batches": True,
        "even_batches": False,
        "gradient_accumulation_kwargs": {"sync_each_batch": True},
    }
    told = regression(tmp_path, accelerator_config=config)
    for name, value in list(config.items())[:3]:
        assert getattr(told.accelerator, name) == value
    assert told.accelerator.syncs_each_batch
    plain = regression(tmp_path).accelerator
    found = (plain.split_batches, plain.dispatch_batches, plain.even_batches)
    assert found == (False, None, True) and plain.use_seedable_sampler
    assert "sync_each_batch" not in plain.gradient_state.plugin_kwargs


def test_accumulation_may_be_said_in_the_accelerators_config(tmp_path: Path) -> None:
    config = {"gradient_accumulation_kwargs": {"num_steps": 4}}
    run = regression(tmp_path, accelerator_config=config, num_train_epochs=1)
    assert run.train().global_step == 2
    with pytest.raises(ValueError, match="The `AcceleratorConfig`'s `num_steps` is set but"):
        regression(tmp_path, accelerator_config=config, gradient_accumulation_steps=2)


# ---- Batch sizes that are found ----


class OutOfMemory(TrainerCallback):
    """Fails as a GPU does, at batches of 16 and more."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.train_batch_size >= 16:
            raise RuntimeError("CUDA out of memory.")


def test_a_batch_size_that_fits_is_found_and_kept_at_resume(tmp_path: Path) -> None:
    fields = {
        "per_device_train_batch_size": 16,
        "auto_find_batch_size": True,
        "max_steps": 2,
        "save_strategy": "steps",
        "save_steps": 1,
    }
    run = regression(tmp_path, callbacks=[OutOfMemory()], **fields)
    run.train()
    assert run._train_batch_size == 14
    again = regression(tmp_path, **fields)
    assert again._train_batch_size == 16
    again.train(resume_from_checkpoint=True)
    assert again._train_batch_size == 14


# ---- Data ----


class Joined:
    """Loaders one after another: no `DataLoader`, and no `dataset`."""

    def __init__(self, loaders: list[DataLoader[Any]]) -> None:
        self.loaders = loaders

    def __len__(self) -> int:
        return sum(len(loader) for loader in self.loaders)

    def __iter__(self) -> Iterator[Any]:
        for loader in self.loaders:
            yield from loader


def test_a_loader_needs_no_dataset(tmp_path: Path) -> None:
    class Twice(Trainer):
        def get_train_dataloader(self) -> Any:
            return Joined([super().get_train_dataloader(), super().get_train_dataloader()])

    run = Twice(model=Regression(), args=arguments(tmp_path), train_dataset=Points(8))
    assert run.train().global_step == 8


def test_loaders_with_persistent_workers_are_made_once(tmp_path: Path) -> None:
    sets = {"one": Points(4), "two": Points(6)}
    workers = {"dataloader_persistent_workers": True, "dataloader_num_workers": 1}
    kept = regression(tmp_path, eval_dataset=sets, **workers)
    assert kept.get_eval_dataloader("one") is kept.get_eval_dataloader("one")
    assert kept.get_eval_dataloader("two").dataset is sets["two"]
    fresh = regression(tmp_path, eval_dataset=sets)
    assert fresh.get_eval_dataloader("one") is not fresh.get_eval_dataloader("one")


def _evaluate_stream(world: RankInfo, folder: str) -> tuple[float, int]:
    run = regression(folder, per_device_eval_batch_size=3)
    figures = run.evaluate(PointStream(10))
    return figures["eval_loss"], len(run.predict(PointStream(10)).predictions)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_stream_of_uneven_length_counts_each_sample_once(tmp_path: Path, ranks: int) -> None:
    expected = regression(tmp_path, per_device_eval_batch_size=3).evaluate(Points(10))
    loss, rows = run_ranks(ranks, _evaluate_stream, str(tmp_path))[0]
    assert rows == 10
    # With ranks, the last batch's mean has repeated samples in it, as it has in transformers.
    assert loss == pytest.approx(expected["eval_loss"], rel=1e-6 if ranks == 1 else 0.5)


# ---- Warnings where people look for them ----


def test_label_smoothing_is_off_for_several_labels_a_sample(tmp_path: Path) -> None:
    class Config:
        problem_type = "multi_label_classification"

    model = Regression()
    model.config = Config()  # type: ignore[assignment]
    with pytest.warns(UserWarning, match="Label smoothing is not compatible with multi-label"):
        run = Trainer(model=model, args=arguments(tmp_path, label_smoothing_factor=0.1))
    assert run.label_smoother is None


def test_a_callback_that_is_missing_at_resume_is_named(tmp_path: Path) -> None:
    steps = {"save_strategy": "steps", "eval_strategy": "steps", "save_steps": 2, "eval_steps": 2}
    stopping = EarlyStoppingCallback(early_stopping_patience=5)
    fields = {"max_steps": 2, **steps}
    regression(tmp_path, callbacks=[stopping], load_best_model_at_end=True, **fields).train()
    run = regression(tmp_path, restore_callback_states_from_checkpoint=True, **fields)
    with patch("transformers.trainer.logger.warning") as warn:
        run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert "EarlyStoppingCallback" in warn.call_args[0][0]


def test_log_level_decides_what_is_said(tmp_path: Path) -> None:
    logger = transformers.logging.get_logger()
    said = {}
    for level in ("debug", "error"):
        with CaptureLogger(logger) as captured:
            regression(tmp_path, log_level=level, max_steps=1).train()
        said[level] = "Running training" in captured.out
    assert said == {"debug": True, "error": False}


# ---- Checkpoints ----


def test_weights_that_were_split_afterwards_are_resumed_from(tmp_path: Path) -> None:
    fields = {"save_strategy": "steps", "save_steps": 5}
    whole = regression(tmp_path, **fields)
    whole.train()
    checkpoint = tmp_path / "checkpoint-5"
    weights = safetensors.torch.load_file(checkpoint / "model.safetensors")
    (checkpoint / "model.safetensors").unlink()
    places = {name: f"model-{i}.safetensors" for i, name in enumerate(weights)}
    for name, file in places.items():
        safetensors.torch.save_file({name: weights[name]}, checkpoint / file)
    index = {"metadata": {}, "weight_map": places}
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps(index))
    rest = regression(tmp_path / "rest", **fields)
    rest.train(resume_from_checkpoint=str(checkpoint))
    assert same_weights(whole.model, rest.model)


def test_frozen_parameters_stay_frozen_at_resume(tmp_path: Path) -> None:
    runs = []
    for resume in (None, str(tmp_path / "checkpoint-5")):
        run = regression(tmp_path, save_strategy="steps", save_steps=5)
        run.model.layer.bias.requires_grad_(False)
        run.train(resume_from_checkpoint=resume)
        runs.append(run)
    assert same_weights(runs[0].model, runs[1].model)
    assert not runs[1].model.layer.bias.requires_grad
    assert history(runs[0])[:-1] == history(runs[1])[:-1]


def test_a_limit_of_one_leaves_the_best_alone_at_the_end(tmp_path: Path) -> None:
    run = regression(
        tmp_path,
        eval_strategy="steps",
        save_strategy="steps",
        eval_steps=4,
        save_steps=4,
        save_total_limit=1,
        metric_for_best_model="loss",
        greater_is_better=True,
    )
    run.train()
    assert run.state.best_global_step == 4
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-4"]
    assert run.state.best_model_checkpoint == str(tmp_path / "checkpoint-4")


def test_sigterm_saves_with_enable_jit_checkpoint(tmp_path: Path) -> None:
    class Preempted(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 3:
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(3.2)  # transformers waits three seconds before it saves

    run = regression(tmp_path, enable_jit_checkpoint=True, callbacks=[Preempted()])
    run.train()
    assert run.state.global_step < 8
    assert (tmp_path / "checkpoint-3").is_dir()


# ---- Outputs ----


class TwoOutputs(nn.Module):
    """Two predictions, two labels, and a loss in a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 1)

    def forward(
        self, x: Tensor, labels: Tensor | None = None, labels_2: Tensor | None = None
    ) -> dict[str, Tensor]:
        guess = self.layer(x).squeeze(-1)
        outputs = {"one": guess, "two": 2 * guess}
        return outputs if labels is None else {"loss": ((guess - labels) ** 2).mean(), **outputs}


class TwoLabels(Points):
    def __getitem__(self, index: int) -> dict[str, Tensor]:
        sample = super().__getitem__(index)
        return {**sample, "labels_2": -sample["labels"]}


def test_several_outputs_and_labels_come_back_as_tuples(tmp_path: Path) -> None:
    args = arguments(tmp_path, label_names=["labels", "labels_2"], per_device_eval_batch_size=4)
    run = Trainer(model=TwoOutputs(), args=args)
    data = TwoLabels(6)
    predictions, labels, metrics = run.predict(data)
    assert np.allclose(predictions[1], 2 * predictions[0]) and len(predictions[0]) == 6
    assert np.array_equal(labels[1], -labels[0])
    assert metrics is not None and "test_loss" in metrics


class Rich(Regression):
    """Gives outputs of every kind: nested, with samples, and a scalar."""

    def forward(self, x: Tensor, labels: Tensor | None = None) -> tuple[Any, ...]:
        loss, guess = super().forward(x, torch.zeros(len(x)) if labels is None else labels)
        return (loss, (x, 2 * x), guess, guess.mean())


@pytest.mark.parametrize("count", [8, 9, 10])
@pytest.mark.parametrize("as_objects", [False, True])
def test_predictions_of_a_short_last_batch_are_those_of_transformers(
    tmp_path: Path, count: int, as_objects: bool
) -> None:
    asked = {"per_device_eval_batch_size": 4, "eval_use_gather_object": as_objects}
    model = Regression() if as_objects else Rich()
    ours = trainer(tmp_path, model=model, data=Points(8), **asked).predict(Points(count))
    theirs = transformers.Trainer(
        model=model,
        args=arguments(tmp_path, kind=transformers.TrainingArguments, **asked),
    ).predict(Points(count))

    def shapes(outputs: Any) -> Any:
        return (
            [shapes(one) for one in outputs]
            if isinstance(outputs, (tuple, list))
            else (outputs.shape)
        )

    assert shapes(ours.predictions) == shapes(theirs.predictions)
    last = ours.predictions if as_objects else ours.predictions[1]
    np.testing.assert_array_equal(last, theirs.predictions if as_objects else theirs.predictions[1])


def test_a_training_step_and_a_prediction_step_give_one_loss_before_any_training(
    tmp_path: Path,
) -> None:
    run = regression(tmp_path)
    batch = torch.utils.data.default_collate([Points(4)[index] for index in range(4)])
    trained = run.training_step(run.model, dict(batch), None)
    predicted = run.prediction_step(run.model, dict(batch), prediction_loss_only=True)[0]
    torch.testing.assert_close(trained, predicted)


def test_end_can_be_called_when_all_is_done(tmp_path: Path) -> None:
    run = regression(tmp_path, max_steps=1)
    run.train()
    run.end()


def test_memory_metrics_come_with_every_stage_when_they_are_asked_for(tmp_path: Path) -> None:
    run = regression(tmp_path, skip_memory_metrics=False, num_train_epochs=1)
    trained = run.train().metrics
    assert {"init_mem_cpu_alloc_delta", "train_mem_cpu_alloc_delta"} <= set(trained)
    assert "eval_mem_cpu_peaked_delta" in run.evaluate()
    assert "test_mem_cpu_alloc_delta" in run.predict(Points(4)).metrics
    assert not [key for key in regression(tmp_path).evaluate() if "_mem_" in key]


def test_a_model_is_found_in_any_wrapper_of_torchs(tmp_path: Path) -> None:
    run = regression(tmp_path)
    assert run.accelerator.unwrap_model(nn.DataParallel(run.model)) is run.model


def test_padding_that_can_not_be_told_is_said_where_people_look(tmp_path: Path) -> None:
    run = trainer(tmp_path, include_num_input_tokens_seen="non_padding", max_steps=1)
    with CaptureLogger(transformers.logging.get_logger("transformers.trainer")) as said:
        run.train()
    assert "Could not determine method to count non-padding tokens" in said.out
    assert run.state.num_input_tokens_seen == 4 * 16


# ---- What scripts do with a trainer ----


def test_a_loader_of_an_override_is_prepared_by_the_accelerator(tmp_path: Path) -> None:
    class Own(Trainer):
        def get_train_dataloader(self) -> Any:
            return self.accelerator.prepare(DataLoader(self.train_dataset, batch_size=8))

    run = Own(model=Regression(), args=arguments(tmp_path), train_dataset=Points(32))
    assert run.train().global_step == 8
    beside = run.accelerator.prepare_model(Regression(), evaluation_mode=True)
    assert isinstance(beside, Regression)
    assert run.accelerator.prepare(run.model, run.optimizer) == (run.model_wrapped, run.optimizer)
    stranger = Regression()
    for other in (stranger, torch.optim.SGD(stranger.parameters(), lr=0.1)):
        with pytest.raises(UnsupportedError, match="prepare_model"):
            run.accelerator.prepare(other)


def test_an_evaluation_without_memory_is_no_reason_for_smaller_training_batches(
    tmp_path: Path,
) -> None:
    class Own(Trainer):
        tries = 0

        def evaluation_loop(self, *_: Any, **__: Any) -> Any:
            self.tries += 1
            raise RuntimeError("CUDA out of memory.")

    run = Own(
        model=Regression(),
        args=arguments(tmp_path, auto_find_batch_size=True, eval_strategy="epoch"),
        train_dataset=Points(16),
        eval_dataset=Points(4),
    )
    with pytest.raises(RuntimeError, match="reduce `per_device_eval_batch_size`"):
        run.train()
    assert run.tries == 1


def test_the_norm_is_logged_without_clipping_whenever_a_log_comes(tmp_path: Path) -> None:
    class AtThree(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_log = state.global_step == 3

    fields: dict[str, Any] = {"max_grad_norm": 0, "num_train_epochs": 1}
    by_epoch = regression(tmp_path, logging_strategy="epoch", **fields)
    asked = regression(tmp_path, logging_steps=100, callbacks=[AtThree()], **fields)
    for run in (by_epoch, asked):
        run.train()
        assert "grad_norm" in history(run)[0]


def test_the_length_of_a_training_can_be_overridden(tmp_path: Path) -> None:
    class Own(Trainer):
        def set_initial_training_values(self, args: Any, dataloader: Any) -> Any:
            return (*super().set_initial_training_values(args, dataloader)[:-1], 3)

    run = Own(model=Regression(), args=arguments(tmp_path), train_dataset=Points(32))
    assert run.train().global_step == 3 and run.state.max_steps == 3


def test_overwriting_continues_from_what_was_there_and_not_from_itself(tmp_path: Path) -> None:
    fields: dict[str, Any] = {"save_strategy": "steps", "save_steps": 4, "num_train_epochs": 1}
    run = regression(tmp_path, overwrite_output_dir=True, **fields)
    first = run.train().training_loss
    assert run.train().training_loss < first and len(history(run)) > 1


# ---- Notebooks ----


@contextmanager
def _pretending_to_be_a_notebook(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Just enough of IPython, which is not installed, for its table of losses; what it shows."""
    shown: list[str] = []
    notebook, display = types.ModuleType("IPython"), types.ModuleType("IPython.display")
    notebook.__spec__ = ModuleSpec("IPython", None)
    kernel = SimpleNamespace(config={"IPKernelApp": {}})
    table = SimpleNamespace(update=lambda html: shown.append(html))
    notebook.__dict__.update(display=display, get_ipython=lambda: kernel)
    display.__dict__.update(HTML=str, display=lambda html, display_id=False: table)
    monkeypatch.setitem(sys.modules, "IPython", notebook)
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    is_in_notebook.cache_clear()
    yield shown
    monkeypatch.undo()
    is_in_notebook.cache_clear()


def test_a_notebook_shows_a_table_and_a_terminal_a_bar(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def bars(**changed: Any) -> list[str]:
        run = regression(tmp_path, disable_tqdm=False, eval_strategy="epoch", **changed)
        run.train()
        return [type(one).__name__ for one in run.callback_handler.callbacks]

    assert "ProgressCallback" in bars()
    with _pretending_to_be_a_notebook(monkeypatch) as shown:
        found = bars(logging_strategy="epoch")
    assert "NotebookProgressCallback" in found and "ProgressCallback" not in found
    assert "Validation Loss" in shown[-1] and "[16/16" in shown[-1]
