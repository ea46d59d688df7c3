"""What each parameter of Trainer does, on one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, TrainingArguments

from bigtrain.data.byte_tokenizer import make_byte_tokenizer
from bigtrain.trainer.trainer import Trainer
from tests.arguments.rows import Events, Seen, logged, trained, trainer, weights
from tests.trainer.samples import Points, Regression

shows = pytest.mark.shows


@shows("model")
def test_model_is_any_module_and_is_trained_in_place(tmp_path: Path) -> None:
    model = Regression()
    before = model.layer.weight.detach().clone()
    run = trained(tmp_path, model=model)
    assert run.model is model
    assert not torch.equal(model.layer.weight, before)


@shows("args")
def test_args_default_to_a_directory_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert Trainer(model=Regression()).args.output_dir == "tmp_trainer"
    told = Trainer(model=Regression(), args=TrainingArguments("there", seed=7, use_cpu=True))
    assert (told.args.output_dir, told.args.seed) == ("there", 7)


@shows("data_collator")
def test_data_collator_makes_the_batches(tmp_path: Path) -> None:
    def doubled(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        batch: dict[str, Tensor] = torch.utils.data.default_collate(rows)
        return {name: torch.cat([values, values]) for name, values in batch.items()}

    assert len(trained(tmp_path, data_collator=doubled).model.rows) == 32


@shows("processing_class")
def test_processing_class_pads_and_is_saved_with_the_model(tmp_path: Path) -> None:
    run = trainer(tmp_path, processing_class=make_byte_tokenizer())
    padded = run.data_collator([{"input_ids": [1, 2, 3]}, {"input_ids": [4]}])
    assert padded["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    run.save_model()
    assert AutoTokenizer.from_pretrained(tmp_path)("abc") == make_byte_tokenizer()("abc")


@shows("train_dataset")
def test_train_dataset_loses_the_columns_that_the_model_does_not_take(tmp_path: Path) -> None:
    points = Points(8)
    columns = {
        "x": [points[i]["x"].tolist() for i in range(8)],
        "labels": [points[i]["labels"].item() for i in range(8)],
        "text": ["unused"] * 8,
    }
    run = trained(tmp_path, train_dataset=datasets.Dataset.from_dict(columns))
    assert run.state.global_step == 2
    assert sorted(run.model.rows) == sorted(round(row[0], 4) for row in columns["x"])


class Shuffled(torch.utils.data.IterableDataset[dict[str, Tensor]]):
    """In another order every epoch, by a generator that the Trainer seeds."""

    def __init__(self) -> None:
        self.generator = torch.Generator()
        self.epochs: list[int] = []

    def set_epoch(self, epoch: int) -> None:
        self.epochs.append(epoch)

    def __iter__(self) -> Any:
        points = Points(8)
        for index in torch.randperm(8, generator=self.generator).tolist():
            yield points[index]


@shows("train_dataset")
def test_an_iterable_is_told_the_epoch(tmp_path: Path) -> None:
    data = Shuffled()
    trained(tmp_path, train_dataset=data, max_steps=4)
    assert sorted(set(data.epochs)) == [0, 1]


@shows("eval_dataset")
def test_several_evaluation_sets_prefix_their_metrics(tmp_path: Path) -> None:
    sets = {"near": Points(4), "far": Points(8)}
    run = trained(tmp_path, eval_dataset=sets, eval_strategy="epoch")
    assert len(logged(run, "eval_near_loss")) == len(logged(run, "eval_far_loss")) == 1
    assert trainer(tmp_path, eval_dataset=Points(4)).evaluate()["eval_loss"] > 0


@shows("model_init")
def test_model_init_makes_the_model_fresh_at_each_training(tmp_path: Path) -> None:
    made: list[nn.Module] = []

    def make() -> nn.Module:
        made.append(Seen())
        return made[-1]

    run = trainer(tmp_path, model=None, model_init=make)
    run.train()
    first = weights(run)
    run.train()
    assert len(made) == 3 and run.model is made[2]
    assert torch.equal(weights(run), first)


@shows("compute_loss_func")
def test_compute_loss_func_gets_outputs_labels_and_the_items_of_the_window(tmp_path: Path) -> None:
    counts: list[int] = []

    def loss(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        counts.append(int(num_items_in_batch))
        return ((outputs[0] - labels) ** 2).sum() / num_items_in_batch

    told = trained(tmp_path, compute_loss_func=loss, gradient_accumulation_steps=2)
    plain = trained(tmp_path, per_device_train_batch_size=8)
    assert counts == [8, 8, 8, 8]
    assert logged(told, "loss") == pytest.approx(logged(plain, "loss"))


@shows("compute_metrics")
def test_compute_metrics_gets_predictions_and_labels(tmp_path: Path) -> None:
    def error(found: Any) -> dict[str, float]:
        return {"error": float(np.abs(found.predictions - found.label_ids).mean())}

    run = trainer(tmp_path, compute_metrics=error)
    predictions, labels, metrics = run.predict(Points(6))
    assert metrics is not None
    assert metrics["test_error"] == pytest.approx(np.abs(predictions - labels).mean())
    assert "eval_error" in run.evaluate()


@shows("callbacks")
def test_callbacks_join_the_defaults(tmp_path: Path) -> None:
    steps = Events("on_step_end")
    run = trained(tmp_path, callbacks=[steps])
    assert steps.steps == [1, 2, 3, 4]
    assert run.pop_callback(Events) is steps
    assert "DefaultFlowCallback" in run.callback_handler.callback_list


@shows("optimizers")
def test_optimizers_are_used_instead_of_the_arguments(tmp_path: Path) -> None:
    model = Seen()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.125)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    run = trained(tmp_path, model=model, optimizers=(optimizer, scheduler))
    assert run.optimizer is optimizer and run.lr_scheduler is scheduler
    assert logged(run, "learning_rate") == [0.125, 0.0625, 0.03125, 0.015625]


@shows("preprocess_logits_for_metrics")
def test_preprocess_logits_for_metrics_decides_what_is_kept(tmp_path: Path) -> None:
    def halve(logits: Tensor, labels: Tensor) -> Tensor:
        return logits / 2

    plain = trainer(tmp_path).predict(Points(6)).predictions
    run = trainer(tmp_path, preprocess_logits_for_metrics=halve)
    assert np.allclose(run.predict(Points(6)).predictions, plain / 2)
