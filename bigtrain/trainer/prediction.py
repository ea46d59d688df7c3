"""One batch of an evaluation, and the model that it goes through."""

from __future__ import annotations

import time
from typing import Any

import torch
from accelerate.utils.operations import convert_to_fp32
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers.trainer_pt_utils import nested_detach

from bigtrain.trainer import tracing
from bigtrain.trainer.batches import Batches
from bigtrain.trainer.forward import Forward


class Prediction(Batches, Forward):
    """How the trainer predicts."""

    _preparation_s = 0.0  # of the evaluation that runs, which its speed leaves out

    # ---- One batch ----

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Any, Any]:
        """(loss, predictions, labels) of one batch, each None where there is none."""
        names = self.label_names
        has_labels = bool(names) and all(inputs.get(name) is not None for name in names)
        returns_loss = inputs.get("return_loss")
        if returns_loss is None:
            returns_loss = self.can_return_loss
        has_loss = has_labels or (not names and returns_loss)
        inputs = self._prepare_inputs(inputs)
        if ignore_keys is None:
            config = getattr(self.model, "config", None)
            ignore_keys = getattr(config, "keys_to_ignore_at_inference", ["past_key_values"])
        # Label smoothing pops the labels, so they are taken first.
        labels = nested_detach(tuple(inputs.get(name) for name in names)) if has_loss else None
        if labels is not None and len(labels) == 1:
            labels = labels[0]
        with torch.no_grad():
            if has_loss:
                loss, outputs = self._predict_with_loss(model, inputs, prediction_loss_only)
                logits = _without(outputs, [*ignore_keys, "loss"], skip_first=True)
            else:
                with self.compute_loss_context_manager():
                    outputs = model(**inputs)
                loss, logits = None, _without(outputs, ignore_keys, skip_first=False)
        if prediction_loss_only:
            return loss, None, None
        logits = nested_detach(logits)
        if self._engine_config.compute_dtype != "fp32":
            # As accelerate hands them on: what metrics compute would overflow in fp16.
            logits = convert_to_fp32(logits)
        return loss, logits[0] if len(logits) == 1 else logits, labels

    def _predict_with_loss(
        self, model: nn.Module, inputs: dict[str, Any], loss_only: bool
    ) -> tuple[Tensor, Any]:
        num_items = self._get_num_items_in_batch([inputs], self.args.device)
        with self.compute_loss_context_manager():
            if self.args.use_liger_kernel and loss_only:
                inputs = {**inputs, "skip_logits": True}
            loss, outputs = self.compute_loss(
                model, inputs, return_outputs=True, num_items_in_batch=num_items
            )
        return loss.detach().mean(), outputs

    # ---- The model ----

    def _model_for_evaluation(self, dataloader: DataLoader[Any]) -> nn.Module:
        """The callable model, prepared now if no training has done it."""
        self._preparation_s = 0.0
        if not self._is_prepared:
            start = time.time()
            self._prepare_to_evaluate()
            self._preparation_s = time.time() - start
            self.model_preparation_time = round(self._preparation_s, 4)
        model = self.model_wrapped
        if self.is_in_train:
            return model
        if self.args.fp16_full_eval or self.args.bf16_full_eval:
            dtype = torch.float16 if self.args.fp16_full_eval else torch.bfloat16
            model = model.to(dtype=dtype, device=self.args.device)
        if self.args.jit_mode_eval:
            model = tracing.traced(model, dataloader, device=self.args.device)
        return model

    def _set_evaluation_mode(self, model: nn.Module) -> None:
        if hasattr(model, "eval") and callable(model.eval):
            model.eval()
        optimizer: Any = self.optimizer
        if hasattr(optimizer, "eval") and callable(optimizer.eval):
            optimizer.eval()  # schedule-free optimizers have two modes


def _without(outputs: Any, keys: list[str], *, skip_first: bool) -> Any:
    """The outputs to keep, as a tuple; of a tuple, all but the loss in front."""
    if isinstance(outputs, dict):
        return tuple(value for key, value in outputs.items() if key not in keys)
    return outputs[1:] if skip_first else outputs
