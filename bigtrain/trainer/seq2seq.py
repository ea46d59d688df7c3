"""`Seq2SeqTrainer`: evaluates by what the model generates.

On engines that share a model out, ranks generate in step: each goes on, with made-up tokens, until
the last one has finished, so that none waits for another's part of a layer for ever.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import GenerationConfig, TrainerCallback
from transformers.trainer_pt_utils import find_batch_size
from transformers.trainer_utils import PredictionOutput

from bigtrain.engine.protocol import Engine
from bigtrain.errors import UnsupportedError
from bigtrain.trainer import theirs
from bigtrain.trainer.arguments import TrainingArguments
from bigtrain.trainer.trainer import Trainer


@dataclass(repr=False)
class Seq2SeqTrainingArguments(TrainingArguments):
    """`TrainingArguments`, and how to generate in evaluation."""

    sortish_sampler: bool = field(
        default=False, metadata={"help": "Refused: use train_sampling_strategy=group_by_length."}
    )
    predict_with_generate: bool = field(
        default=False, metadata={"help": "Evaluate on what `generate` gives."}
    )
    generation_max_length: int | None = field(
        default=None,
        metadata={"help": "`max_length` of every generation; default: the model's."},
    )
    generation_num_beams: int | None = field(
        default=None, metadata={"help": "`num_beams` of every generation; default: the model's."}
    )
    generation_config: str | GenerationConfig | None = field(
        default=None, metadata={"help": "A GenerationConfig, or where to load one from."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sortish_sampler:
            raise UnsupportedError(
                "sortish_sampler: transformers no longer reads it; use "
                "train_sampling_strategy='group_by_length'"
            )

    def to_dict(self) -> dict[str, Any]:
        values: dict[str, Any] = super().to_dict()
        for name, value in values.items():
            if isinstance(value, GenerationConfig):
                values[name] = value.to_dict()
        return values


class Seq2SeqTrainer(Trainer):
    """A `Trainer` whose predictions are generated, with `predict_with_generate`."""

    args: Seq2SeqTrainingArguments
    _args_class = Seq2SeqTrainingArguments

    def __init__(
        self,
        model: nn.Module | None = None,
        args: theirs.TrainingArguments | None = None,
        data_collator: Callable[..., Any] | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        model_init: Callable[..., nn.Module] | None = None,
        compute_loss_func: Callable[..., Any] | None = None,
        compute_metrics: Callable[..., Any] | None = None,
        callbacks: list[type[TrainerCallback] | TrainerCallback] | None = None,
        optimizers: tuple[Optimizer | None, Any] = (None, None),
        preprocess_logits_for_metrics: Callable[..., Any] | None = None,
        *,
        engine: Engine | None = None,
        tokenizer: Any = None,
    ) -> None:
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            model_init=model_init,
            compute_loss_func=compute_loss_func,
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
            preprocess_logits_for_metrics=preprocess_logits_for_metrics,
            engine=engine,
            tokenizer=tokenizer,
        )
        self._gen_kwargs: dict[str, Any] = {}
        if self.args.generation_config is not None:
            own: Any = self.model
            own.generation_config = self.load_generation_config(self.args.generation_config)

    @staticmethod
    def load_generation_config(gen_config_arg: str | GenerationConfig) -> GenerationConfig:
        """A config of its own, loaded or copied; ValueError where it contradicts itself."""
        load: Any = theirs.Seq2SeqTrainer.load_generation_config
        config: GenerationConfig = load(gen_config_arg)
        return config

    def evaluate(  # type: ignore[override]
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
        **gen_kwargs: Any,
    ) -> dict[str, float]:
        """As `Trainer.evaluate`; `gen_kwargs` (max_length, num_beams, …) go to `generate`."""
        self._generate_by(gen_kwargs)
        return super().evaluate(
            eval_dataset, ignore_keys=ignore_keys, metric_key_prefix=metric_key_prefix
        )

    def predict(  # type: ignore[override]
        self,
        test_dataset: Any,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "test",
        **gen_kwargs: Any,
    ) -> PredictionOutput:
        """As `Trainer.predict`; `gen_kwargs` (max_length, num_beams, …) go to `generate`."""
        self._generate_by(gen_kwargs)
        return super().predict(
            test_dataset, ignore_keys=ignore_keys, metric_key_prefix=metric_key_prefix
        )

    def _generate_by(self, gen_kwargs: dict[str, Any]) -> None:
        asked = dict(gen_kwargs)
        has_length = asked.get("max_length") or asked.get("max_new_tokens")
        if not has_length and self.args.generation_max_length is not None:
            asked["max_length"] = self.args.generation_max_length
        if asked.get("num_beams") is None and self.args.generation_num_beams is not None:
            asked["num_beams"] = self.args.generation_num_beams
        self._gen_kwargs = {name: value for name, value in asked.items() if value is not None}

    # ---- One batch ----

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
        **gen_kwargs: Any,
    ) -> tuple[Tensor | None, Any, Any]:
        """(loss, generated tokens, labels), tokens and labels padded to the longest that may be."""
        if not self.args.predict_with_generate or prediction_loss_only:
            return super().prediction_step(
                model, inputs, prediction_loss_only=prediction_loss_only, ignore_keys=ignore_keys
            )
        inputs = self._prepare_inputs(inputs)
        generated = self._generate(inputs, gen_kwargs or self._gen_kwargs)
        loss = self._loss_without_gradients(model, inputs) if "labels" in inputs else None
        if self.args.prediction_loss_only:
            return loss, None, None
        length = self._longest_generation()
        labels = inputs.get("labels")
        if labels is not None:
            labels = self._pad_tensors_to_max_len(labels, max(length, labels.shape[-1]))
        return loss, self._pad_tensors_to_max_len(generated, length), labels

    def _generate(self, inputs: dict[str, Any], gen_kwargs: dict[str, Any]) -> Tensor:
        asked = {"synced_gpus": self.engine.is_sharded, **gen_kwargs}
        given = dict(inputs)
        labels, decoded = given.get("labels"), given.get("decoder_input_ids")
        if labels is not None and decoded is not None and labels.shape == decoded.shape:
            # Made from the labels: generation would go on behind the answer.
            given = {k: v for k, v in given.items() if not k.startswith("decoder_")}
        whole: Any = self.model
        with torch.no_grad(), self.compute_loss_context_manager():
            tokens: Tensor = whole.generate(**given, **asked)
        return tokens

    def _loss_without_gradients(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        with torch.no_grad(), self.compute_loss_context_manager():
            outputs: Any = model(**inputs)
        if self.label_smoother is not None:
            loss: Tensor = self.label_smoother(outputs, inputs["labels"])
        else:
            loss = outputs["loss"] if isinstance(outputs, dict) else outputs[0]
        return loss.detach().mean()

    # ---- Lengths and rows ----

    def _longest_generation(self) -> int:
        """Tokens that a row may have at most; where the model sets no end, the default one."""
        whole: Any = self.model
        config = self._gen_kwargs.get("generation_config", whole.generation_config)
        new = self._gen_kwargs.get("max_new_tokens", config.max_new_tokens)
        if new is not None:
            return int(new) + 1
        defaults = config._get_default_generation_params()
        length = self._gen_kwargs.get("max_length", config.max_length)
        return int(defaults["max_length"] if length is None else length)

    def _pad_tensors_to_max_len(self, tensor: Tensor, max_length: int) -> Tensor:
        if tensor.shape[-1] >= max_length:
            return tensor
        padded = tensor.new_full((tensor.shape[0], max_length), self._pad_token())
        padded[:, : tensor.shape[-1]] = tensor
        return padded

    def _pad_token(self) -> int:
        source = self.processing_class
        if source is None or not hasattr(source, "pad_token_id"):
            source = getattr(self.model, "config", None)
        token = getattr(source, "pad_token_id", None)
        if token is None:
            token = getattr(self.processing_class, "eos_token_id", None)
        if token is None:
            raise ValueError(
                "Pad_token_id must be set in the configuration of the model, in order to pad "
                "tensors"
            )
        return int(token)

    def _gather_predictions(self, predictions: Any, inputs: dict[str, Any]) -> Any:
        """A sample may have several rows: where the last batch is cut, it is cut by samples."""
        samples, rows = find_batch_size(inputs), find_batch_size(predictions)
        if not samples or not rows or rows == samples or rows % samples:
            return super()._gather_predictions(predictions, inputs)
        each = rows // samples
        by_sample = predictions.view(samples, each, *predictions.shape[1:])
        return super()._gather_predictions(by_sample, inputs).flatten(0, 1)
