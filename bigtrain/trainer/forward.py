"""Forward and backward of one micro-batch: the loss, and what it is divided by."""

from __future__ import annotations

import gc
import logging
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.trainer_utils import unwrap_peft_model
from transformers.training_args import OptimizerNames

from bigtrain.trainer.items import WatchedCount
from bigtrain.trainer.optimization import Optimization

logger = logging.getLogger(__name__)

_LOMO = (OptimizerNames.LOMO, OptimizerNames.ADALOMO)


class Forward(Optimization):
    """What a micro-batch goes through."""

    current_gradient_accumulation_steps = 1

    def training_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """Forward and backward of one micro-batch; the loss, detached. Override for another."""
        # Asked first, for setting it walks over every module; and of the model itself, for
        # DeepSpeed's wrapper says it trains while what it holds evaluates.
        if not (model.training and self.model.training):
            model.train()
        optimizer: Any = self.optimizer
        if hasattr(optimizer, "train") and callable(optimizer.train):
            optimizer.train()  # schedule-free optimizers have two modes
        inputs = self._prepare_inputs(inputs)  # type: ignore[attr-defined]
        with self.compute_loss_context_manager():
            loss: Tensor = self.compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)
        del inputs
        self._maybe_empty_cache()
        if not self._is_loss_scaled(num_items_in_batch):
            loss = loss / self.current_gradient_accumulation_steps
        if self.args.optim in _LOMO:
            self.accelerator.backward(loss, learning_rate=self._get_learning_rate())
        else:
            self.accelerator.backward(loss)
        return loss.detach()

    def _is_loss_scaled(self, num_items: Tensor | int | None) -> bool:
        """True where the loss is normalised over the whole window already."""
        if self.loss_is_scaled_for_ga is not None:
            return self.loss_is_scaled_for_ga
        by_model = self.model_accepts_loss_kwargs and num_items is not None
        return by_model or self.compute_loss_func is not None

    def _maybe_empty_cache(self) -> None:
        """Every so many steps, which all ranks count alike: nobody waits for another's."""
        every = self.args.torch_empty_cache_steps
        if every is None or self.state.global_step % every != 0:
            return
        gc.collect()
        if torch.accelerator.is_available():
            torch.accelerator.empty_cache()

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The loss, or (loss, outputs). Override for another loss, and say by
        `loss_is_scaled_for_ga` whether it is normalised over the accumulated batch."""
        labels = None
        takes_labels = self.label_smoother is not None or self.compute_loss_func is not None
        if takes_labels and "labels" in inputs:
            labels = inputs.pop("labels")
        is_models_loss = labels is None
        outputs = self._outputs_of(model, inputs, num_items_in_batch, is_models_loss=is_models_loss)
        loss = self._loss_of(outputs, labels, inputs, num_items_in_batch)
        counts_items = self.model_accepts_loss_kwargs or self.compute_loss_func is not None
        if (
            self.args.average_tokens_across_devices
            and counts_items
            and not (self._ignores_count and is_models_loss)
            and num_items_in_batch is not None
            and self.accelerator.num_processes > 1
        ):
            # The engine averages over ranks; items were counted over all of them.
            loss = loss * self.accelerator.num_processes
        return (loss, outputs) if return_outputs else loss

    def _outputs_of(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        num_items: Tensor | int | None,
        *,
        is_models_loss: bool,
    ) -> Any:
        """What the model makes of a micro-batch, told of the window's items where it takes them.

        The first time it is watched whether it does: see `items`.
        """
        if not self.model_accepts_loss_kwargs or num_items is None:
            return model(**inputs)
        if isinstance(num_items, Tensor) and self._engine_config.compute_dtype != "fp32":
            # Engines cast a model's floating-point inputs: fp16 ends at 65,504 items.
            num_items = num_items.long()
        if not (self._watches_count and is_models_loss) or self.args.torch_compile:
            return model(**inputs, num_items_in_batch=num_items)
        count = WatchedCount.of(num_items)
        outputs = model(**inputs, num_items_in_batch=count)
        self._watches_count, self._ignores_count = False, not count.was_used
        if self._ignores_count and self.args.gradient_accumulation_steps > 1:
            logger.warning(
                "%s takes num_items_in_batch and leaves its loss a mean: as with transformers' "
                "Trainer, the losses of a step's %d micro-batches are added up; say "
                "`model.accepts_loss_kwargs = False` for their mean",
                type(self.model).__name__,
                self.args.gradient_accumulation_steps,
            )
        return outputs

    def _loss_of(
        self, outputs: Any, labels: Any, inputs: dict[str, Any], num_items: Tensor | int | None
    ) -> Tensor:
        if self.compute_loss_func is not None:
            if labels is None:
                logger.warning("compute_loss_func is given but the batch has no labels")
            return self.compute_loss_func(  # type: ignore[no-any-return]
                outputs, labels, num_items_in_batch=num_items
            )
        if labels is not None and self.label_smoother is not None:
            return self._smoothed_loss(outputs, labels, num_items)
        if isinstance(outputs, dict) and "loss" not in outputs:
            raise ValueError(
                "The model did not return a loss from the inputs, only the following keys: "
                f"{','.join(outputs.keys())}. For reference, the inputs it received are "
                f"{','.join(inputs.keys())}."
            )
        return outputs["loss"] if isinstance(outputs, dict) else outputs[0]  # type: ignore[no-any-return]

    def _smoothed_loss(self, outputs: Any, labels: Any, num_items: Tensor | int | None) -> Tensor:
        name = unwrap_peft_model(self.accelerator.unwrap_model(self.model))._get_name()
        # fully_shard gives a model a class of its own, with this prefix.
        shifts = name.removeprefix("FSDP") in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
        smoother: Any = self.label_smoother
        loss: Tensor = smoother(outputs, labels, shift_labels=shifts, num_items_in_batch=num_items)
        return loss
