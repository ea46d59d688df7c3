"""What the trainer logs: losses at logging steps, work done, and results written to files."""

from __future__ import annotations

import logging
import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers.trainer_pt_utils import log_metrics, metrics_format, save_metrics, save_state
from transformers.trainer_utils import IntervalStrategy, speed_metrics

from bigtrain.trainer import collectives
from bigtrain.trainer.core import TrainerCore, their_logger

logger = logging.getLogger(__name__)


class Reporting(TrainerCore):
    """Logs and counters."""

    log_metrics = log_metrics
    metrics_format = metrics_format
    save_metrics = save_metrics
    save_state = save_state

    _initial_num_input_tokens_seen = 0

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Hand `logs` to the callbacks and to `state.log_history`. Override to add to them."""
        if self.state.epoch is not None:
            logs["epoch"] = self.state.epoch
        if self.args.include_num_input_tokens_seen != "no":
            seen = self.state.num_input_tokens_seen
            logs["num_input_tokens_seen"] = seen
            if start_time is not None:
                now = seen - self._initial_num_input_tokens_seen
                logs.update(speed_metrics("train", start_time, num_tokens=now))
        self.state.log_history.append({**logs, "step": self.state.global_step})
        self._fire("on_log", logs=logs)

    # ---- Losses between two logging steps: on the device, never read in between ----

    def _reset_losses(self) -> None:
        self._tr_loss = self._as_device_tensor(0.0)
        self._total_loss_scalar = 0.0
        self._globalstep_last_logged = self.state.global_step

    def _add_loss_of_step(self, loss: Tensor) -> None:
        if not self.args.logging_nan_inf_filter:
            self._tr_loss = self._tr_loss + loss
            return
        # A loss that is no number counts as the mean of those before it, without asking the device.
        since = 1 + self.state.global_step - self._globalstep_last_logged
        is_finite = loss - loss == 0
        self._tr_loss = self._tr_loss + torch.where(is_finite, loss, self._tr_loss / since)

    def _log_losses(
        self, grad_norm: Tensor | float | None, learning_rate: float | None, start_time: float
    ) -> None:
        """The one place of a training where values are read from the device."""
        loss = collectives.mean(self._tr_loss).item()
        self._tr_loss = torch.zeros_like(self._tr_loss)
        steps = self.state.global_step - self._globalstep_last_logged
        logs: dict[str, float] = {"loss": loss / steps}
        if grad_norm is not None:
            logs["grad_norm"] = float(grad_norm)
        if learning_rate is not None:
            logs["learning_rate"] = learning_rate
        self._total_loss_scalar += loss
        self._globalstep_last_logged = self.state.global_step
        self.store_flos()
        figures = dict(logs)
        self.log(logs, start_time)
        self._reporter.report({**figures, "epoch": self.state.epoch}, self.state)

    # ---- Work ----

    def store_flos(self) -> None:
        """Add up the operations of all ranks in the state."""
        self.state.total_flos += collectives.total(self.current_flos, device=self.engine.device)
        self.current_flos = 0.0

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Floating-point operations of forward and backward on a batch; 0 when unknown."""
        name = getattr(self.model, "main_input_name", "input_ids")
        if name not in inputs or not hasattr(self.model, "num_parameters"):
            return 0
        if self._flos_per_token is None:
            self._flos_per_token = 6 * _num_parameters(self.model)
        return self._flos_per_token * int(inputs[name].numel())

    def _count_work(self, inputs: Any) -> None:
        """Operations and tokens of a micro-batch of this rank: from shapes alone."""
        flos = float(self.floating_point_ops(inputs))
        self.current_flos += flos
        name = getattr(self.model, "main_input_name", "input_ids")
        tokens = inputs.get(name)
        self._reporter.count(tokens=tokens.numel() if isinstance(tokens, Tensor) else 0, flos=flos)

    def _track_num_input_tokens(self, inputs: Any) -> None:
        """Input tokens of all ranks, when the arguments ask for them: this waits for the device."""
        if self.args.include_num_input_tokens_seen == "no":
            return
        name = getattr(self.model, "main_input_name", "input_ids")
        if name not in inputs:
            logger.warning(
                "tokens can't be counted: no input %r; give the model class a main_input_name", name
            )
            return
        count = self._count_tokens(inputs, inputs[name])
        total = collectives.total(float(count), device=self.engine.device)
        self.state.num_input_tokens_seen += int(total)

    def _count_tokens(self, inputs: Any, tokens: Tensor) -> int:
        if self.args.include_num_input_tokens_seen == "non_padding":
            if "attention_mask" in inputs:
                return int(inputs["attention_mask"].sum())
            pad = getattr(self.processing_class, "pad_token_id", None)
            if pad is not None:
                return int((tokens != pad).sum())
            their_logger.warning(
                "Could not determine method to count non-padding tokens, falling back to counting "
                "all tokens."
            )
        return tokens.numel()

    # ---- The gradient norm, which is a figure of the log ----

    def _norm_limit(self) -> float | None:
        """What `engine.step` clips to. Without clipping the norm is still logged, so it is asked
        for (with a limit that nothing reaches) at the steps that log."""
        args, step = self.args, self.state.global_step + 1
        if args.max_grad_norm is not None and args.max_grad_norm > 0:
            return float(args.max_grad_norm)
        if args.logging_strategy != IntervalStrategy.STEPS:
            return math.inf  # whichever step is logged
        logs = step % max(1, self.state.logging_steps) == 0 or self._logs_when_it_likes()
        return math.inf if logs or (step == 1 and args.logging_first_step) else None

    def _logs_when_it_likes(self) -> bool:
        """Whether a callback of the user's may ask for a log at any step."""
        return any(
            not type(callback).__module__.startswith("transformers.")
            for callback in self.callback_handler.callbacks
        )


def _num_parameters(model: nn.Module) -> int:
    """Parameters outside embeddings, counted whole: a shard knows its global shape."""
    count = model.num_parameters(exclude_embeddings=True)  # type: ignore[operator]
    if count:
        return int(count)
    shapes = [getattr(p, "ds_shape", p.shape) for p in model.parameters()]
    return sum(math.prod(shape) for shape in shapes)
