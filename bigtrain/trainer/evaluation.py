"""Evaluation and prediction, during training, after it, or without any."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from accelerate.utils.memory import should_reduce_batch_size
from torch import nn
from torch.utils.data import DataLoader, IterableDataset
from transformers.trainer_pt_utils import (
    EvalLoopContainer,
    IterableDatasetShard,
    find_batch_size,
)
from transformers.trainer_utils import (
    EvalLoopOutput,
    EvalPrediction,
    PredictionOutput,
    SaveStrategy,
    denumpify_detensorize,
    has_length,
    speed_metrics,
)

from bigtrain.errors import BigtrainError
from bigtrain.trainer.prediction import Prediction
from bigtrain.trainer.reporting import Reporting

logger = logging.getLogger(__name__)

_PADDING = -100
# What every evaluation has.
_OWN_METRICS = (
    "loss",
    "runtime",
    "samples_per_second",
    "steps_per_second",
    "model_preparation_time",
)


class UnknownMetricError(BigtrainError, KeyError, ValueError):
    """The best model is asked for by a metric that no evaluation has."""

    def __init__(self, name: str, known: list[str]) -> None:
        super().__init__(
            f"The `metric_for_best_model` training argument is set to '{name}', which is not "
            f"found in the evaluation metrics. The available evaluation metrics are: {known}. "
            "Consider changing the `metric_for_best_model` via the TrainingArguments."
        )


@dataclass(kw_only=True)
class _Collected:
    """What an evaluation keeps of every batch."""

    concat: bool
    parts: dict[str, EvalLoopContainer] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("losses", "predictions", "labels", "inputs"):
            self.parts[name] = EvalLoopContainer(self.concat, padding_index=_PADDING)

    def move_to_cpu(self) -> None:
        for part in self.parts.values():
            part.to_cpu_and_numpy()

    def arrays(self) -> dict[str, Any]:
        return {name: part.get_arrays() for name, part in self.parts.items()}


class Evaluation(Prediction, Reporting):
    """How the trainer evaluates."""

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Metrics of the evaluation set, of each of several, or of the one given here.

        All ranks call it. A dict of datasets gives one dict, each key with its set's name.
        """
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(dataset, dict):
            metrics: dict[str, float] = {}
            for name, one in dataset.items():
                metrics |= self.evaluate(
                    name if eval_dataset is None else one,
                    ignore_keys=ignore_keys,
                    metric_key_prefix=f"{metric_key_prefix}_{name}",
                )
            return metrics
        self._memory_tracker.start()
        loader = self.get_eval_dataloader(dataset)
        start_time = time.time()
        output = self.evaluation_loop(
            loader,
            description="Evaluation",
            # Without metrics there is nothing that predictions would be kept for.
            prediction_loss_only=True if self.compute_metrics is None else None,
            ignore_keys=ignore_keys,
            metric_key_prefix=metric_key_prefix,
        )
        found = self._with_speed(output, metric_key_prefix, start_time)
        self.log(found)
        self._fire("on_evaluate", metrics=found)
        self._reporter.report_evaluation(found, self.state)
        self._memory_tracker.stop_and_update_metrics(found)
        return found

    def predict(
        self,
        test_dataset: Any,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "test",
    ) -> PredictionOutput:
        """Predictions for a dataset, and its metrics where it has labels. All ranks call it."""
        self._memory_tracker.start()
        loader = self.get_test_dataloader(test_dataset)
        start_time = time.time()
        output = self.evaluation_loop(
            loader,
            description="Prediction",
            ignore_keys=ignore_keys,
            metric_key_prefix=metric_key_prefix,
        )
        metrics = self._with_speed(output, metric_key_prefix, start_time)
        self._fire("on_predict", metrics=metrics)
        self._memory_tracker.stop_and_update_metrics(metrics)
        return PredictionOutput(
            predictions=output.predictions, label_ids=output.label_ids, metrics=metrics
        )

    def _with_speed(
        self, output: EvalLoopOutput, prefix: str, start_time: float
    ) -> dict[str, float]:
        """The evaluation's metrics, with how fast it was: preparing the model does not count."""
        metrics = output.metrics or {}
        num_samples = output.num_samples or 0
        global_batch = self.args.eval_batch_size * self.args.world_size
        speed = speed_metrics(
            prefix,
            start_time + self._preparation_s,
            num_samples=num_samples,
            num_steps=math.ceil(num_samples / global_batch),
        )
        return {**metrics, **speed}

    # ---- The loop ----

    def evaluation_loop(
        self,
        dataloader: DataLoader[Any],
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Run over a loader; shared by `evaluate` and `predict`, with labels or without."""
        args = self.args
        if prediction_loss_only is None:
            prediction_loss_only = args.prediction_loss_only
        model = self._model_for_evaluation(dataloader)
        self._set_evaluation_mode(model)
        self.callback_handler.eval_dataloader = dataloader
        collected = _Collected(concat=args.eval_do_concat_batches)
        keeps_batches = not args.batch_eval_metrics or description == "Prediction"
        metrics: dict[str, Any] | None = None
        num_seen = 0
        for step, inputs in enumerate(self._until_stopped(dataloader)):
            num_seen += find_batch_size(inputs) or 0
            repeats = self._repeats(inputs, dataloader)
            batch = self._evaluate_batch(model, inputs, prediction_loss_only, ignore_keys, repeats)
            self._collect(collected, batch, keeps_batches=keeps_batches)
            self._fire("on_prediction_step")
            if args.batch_eval_metrics:
                metrics = self._batch_metrics(batch, inputs, metrics)
            elif args.eval_accumulation_steps and (step + 1) % args.eval_accumulation_steps == 0:
                collected.move_to_cpu()
            del batch, inputs
        self._reset_gather()
        arrays = collected.arrays()
        metrics = self._metrics(arrays, metrics)
        self._add_loss(metrics, arrays["losses"], metric_key_prefix)
        return EvalLoopOutput(
            predictions=arrays["predictions"],
            label_ids=arrays["labels"],
            metrics=_with_prefix(metrics, metric_key_prefix),
            num_samples=self._num_samples(dataloader, num_seen),
        )

    def _until_stopped(self, dataloader: Iterable[Any]) -> Iterable[Any]:
        """The batches, with a look at the stop flag between them: an evaluation can be long."""
        for inputs in dataloader:
            if self._stop.is_armed:
                self._stop.check()
                if not self._has_exchanged:
                    self._stop.exchange(None)
                self._has_exchanged = False
            yield inputs

    def _evaluate_batch(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        loss_only: bool,
        ignore_keys: list[str] | None,
        repeats: int,
    ) -> dict[str, Any]:
        """Loss (`repeats` times a rank), predictions, labels and inputs of a batch of all ranks."""
        loss, logits, labels = self.prediction_step(
            model, inputs, loss_only, ignore_keys=ignore_keys
        )
        batch: dict[str, Any] = dict.fromkeys(("losses", "predictions", "labels", "inputs"))
        if loss is not None:
            batch["losses"] = self.gather_function(loss.repeat(repeats))
        if "inputs" in self.args.include_for_metrics:
            name = getattr(self.model, "main_input_name", "input_ids")
            batch["inputs"] = self._gather_padded(self._prepare_input(inputs[name]))
        if labels is not None:
            labels = self.accelerator.pad_across_processes(labels, dim=1, pad_index=_PADDING)
        if logits is not None:
            logits = self.accelerator.pad_across_processes(logits, dim=1, pad_index=_PADDING)
            if self.preprocess_logits_for_metrics is not None:
                logits = self.preprocess_logits_for_metrics(logits, labels)
            batch["predictions"] = self._gather_predictions(logits, inputs)
        if labels is not None:
            batch["labels"] = self.gather_function(labels)
        return batch

    def _repeats(self, inputs: dict[str, Any], dataloader: Any) -> int:
        """How often this rank counts a batch's loss.

        In one process as transformers does, where it is cut afterwards to what the last batch has
        of the dataset. Among several ranks, and of a dataset without a length, by its samples.
        """
        whole: int = self.args.eval_batch_size
        dataset = getattr(dataloader, "dataset", None)
        has_end = not isinstance(dataset, IterableDataset) or has_length(dataset)
        if has_end and self.accelerator.num_processes == 1:
            return whole
        return find_batch_size(inputs) or whole

    def _gather_predictions(self, predictions: Any, inputs: dict[str, Any]) -> Any:
        """Predictions of all ranks, one for every sample of a batch."""
        return self.gather_function(predictions)

    def _gather_padded(self, data: Any) -> Any:
        padded = self.accelerator.pad_across_processes(data, dim=1, pad_index=_PADDING)
        return self.gather_function(padded)

    def _collect(
        self, collected: _Collected, batch: Mapping[str, Any], *, keeps_batches: bool
    ) -> None:
        for name, value in batch.items():
            if value is not None and (name == "losses" or keeps_batches):
                collected.parts[name].add(value)

    # ---- Metrics ----

    def _batch_metrics(
        self, batch: Mapping[str, Any], inputs: Any, previous: dict[str, Any] | None
    ) -> dict[str, Any] | None:
        predictions, labels = batch["predictions"], batch["labels"]
        if self.compute_metrics is None or predictions is None or labels is None:
            return previous
        wanted = self.args.include_for_metrics
        metrics: dict[str, Any] = self.compute_metrics(
            EvalPrediction(
                predictions=predictions,
                label_ids=labels,
                losses=batch["losses"] if "loss" in wanted else None,
                inputs=inputs if "inputs" in wanted else None,
            ),
            compute_result=self.accelerator.gradient_state.end_of_dataloader,
        )
        return metrics

    def _metrics(
        self, arrays: Mapping[str, Any], from_batches: dict[str, Any] | None
    ) -> dict[str, Any]:
        metrics = from_batches or {}
        has_both = arrays["predictions"] is not None and arrays["labels"] is not None
        if self.compute_metrics is not None and has_both and not self.args.batch_eval_metrics:
            wanted = self.args.include_for_metrics
            metrics = self.compute_metrics(
                EvalPrediction(
                    predictions=arrays["predictions"],
                    label_ids=arrays["labels"],
                    losses=arrays["losses"] if "loss" in wanted else None,
                    inputs=arrays["inputs"] if "inputs" in wanted else None,
                )
            )
        plain: dict[str, Any] = denumpify_detensorize(metrics)
        return plain

    def _add_loss(self, metrics: dict[str, Any], losses: Any, prefix: str) -> None:
        if isinstance(losses, list) and losses:
            losses = np.concatenate(losses)
        if isinstance(losses, np.ndarray):
            finite = np.isfinite(losses)
            if self.args.logging_nan_inf_filter and finite.any():
                losses = losses[finite]
            metrics[f"{prefix}_loss"] = losses.mean().item()
        if hasattr(self, "model_preparation_time"):
            metrics[f"{prefix}_model_preparation_time"] = self.model_preparation_time

    def _num_samples(self, dataloader: DataLoader[Any], num_seen: int) -> int:
        dataset: Any = getattr(dataloader, "dataset", None)
        if has_length(dataset):
            count = len(dataset)
        elif isinstance(dataset, IterableDatasetShard) and getattr(dataset, "num_examples", 0) > 0:
            count = dataset.num_examples
        else:
            count = self.num_examples(dataloader) if has_length(dataloader) else num_seen
        return count or num_seen

    # ---- During training ----

    def _evaluate(
        self,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
        skip_scheduler: bool = False,
    ) -> dict[str, float]:
        """Evaluate in training; a schedule that follows a metric then takes its step."""
        metrics = self._evaluate_in_training(ignore_keys_for_eval)
        self._report_to_hp_search(trial, self.state.global_step, metrics)
        if self._follows_metric() and not skip_scheduler:
            self.lr_scheduler.step(self._watched_metric(metrics))
        return metrics

    def _evaluate_in_training(self, ignore_keys: list[str] | None) -> dict[str, float]:
        """`evaluate`, whose want of memory is no reason for smaller training batches."""
        try:
            return self.evaluate(ignore_keys=ignore_keys)
        except RuntimeError as fault:
            if self.args.auto_find_batch_size and should_reduce_batch_size(fault):
                raise RuntimeError(
                    "Evaluation hit an out-of-memory error. `auto_find_batch_size` only adjusts "
                    "the training batch size, reduce `per_device_eval_batch_size` instead."
                ) from fault
            raise

    def _watched_name(self) -> str:
        name = str(self.args.metric_for_best_model)
        return name if name.startswith("eval_") else f"eval_{name}"

    def _check_metric_name(self, *, is_overridden: bool) -> None:
        """Refuse at construction a metric that no evaluation can have: without `compute_metrics`
        its metrics are known. UnknownMetricError."""
        args = self.args
        watches = args.metric_for_best_model is not None and args.eval_strategy != "no"
        if not watches or self.compute_metrics is not None or is_overridden:
            return
        sets = self.eval_dataset
        prefixes = [f"eval_{name}" for name in sets] if isinstance(sets, dict) else ["eval"]
        known = [f"{prefix}_{metric}" for prefix in prefixes for metric in _OWN_METRICS]
        if self._watched_name() not in known and args.skip_memory_metrics:
            raise UnknownMetricError(self._watched_name(), known)

    def _watched_metric(self, metrics: dict[str, float]) -> float:
        name = self._watched_name()
        if name not in metrics:
            raise UnknownMetricError(name, list(metrics))
        return metrics[name]

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any = None) -> bool:
        """True when this evaluation is the best so far; then the state remembers its step."""
        if self.args.metric_for_best_model is None:
            return False
        value, best = self._watched_metric(metrics), self.state.best_metric
        if best is None:
            best = float("-inf") if self.args.greater_is_better else float("inf")
            self.state.best_metric = best
        if not (value > best if self.args.greater_is_better else value < best):
            return False
        self.state.best_metric = value
        if self.args.save_strategy != SaveStrategy.NO:
            self.state.best_global_step = self.state.global_step
        return True


def _with_prefix(metrics: dict[str, Any], prefix: str) -> dict[str, Any]:
    """As transformers has them: first what bears the prefix already, then all that gets it now,
    which wins where both are there."""
    prefixed = dict(metrics)
    for key in metrics:
        if not key.startswith(f"{prefix}_"):
            prefixed[f"{prefix}_{key}"] = prefixed.pop(key)
    return prefixed
