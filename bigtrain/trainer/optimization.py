"""Optimizer and schedule: which are made, and the learning rate that is in force."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau
from transformers import TrainingArguments
from transformers.optimization import GreedyLR, get_scheduler
from transformers.trainer_optimizer import (
    _OPTIMIZER_HANDLERS,
    OptimizerContext,
    _parse_optim_args,
    is_optimizer_factory,
)
from transformers.trainer_pt_utils import (
    get_learning_rates,
    get_num_trainable_parameters,
    get_optimizer_group,
    get_parameter_names,
)

from bigtrain.trainer.core import TrainerCore

# Biases and norms are not decayed, whatever their layer's class.
_NOT_DECAYED = [
    r"bias",
    r"layernorm",
    r"rmsnorm",
    r"(?:^|\.)norm(?:$|\.)",
    r"_norm(?:$|\.)",
]

_FP16_EPS = 1e-4

logger = logging.getLogger(__name__)


class Optimization(TrainerCore):
    """How the trainer makes its optimizer and scheduler."""

    get_learning_rates = get_learning_rates
    get_num_trainable_parameters = get_num_trainable_parameters
    get_optimizer_group = get_optimizer_group

    _created_lr_scheduler = False

    def create_optimizer_and_scheduler(self, num_training_steps: int) -> None:
        """Make both. Override this, or one of the two, for others."""
        self.create_optimizer()
        self.create_scheduler(num_training_steps=num_training_steps)

    def create_optimizer(self, model: nn.Module | None = None) -> Optimizer:
        """The optimizer, made as `args.optim` says unless one was given."""
        if self.optimizer is None:
            opt_model = self.model if model is None else model
            if self.optimizer_cls_and_kwargs is not None:
                make, kwargs = self.optimizer_cls_and_kwargs
            else:
                make, kwargs = self.get_optimizer_cls_and_kwargs(self.args, opt_model)
            self.optimizer = self._make_optimizer(make, dict(kwargs), opt_model)
        return self.optimizer

    def _make_optimizer(self, make: Any, kwargs: dict[str, Any], model: nn.Module) -> Optimizer:
        optimizer: Optimizer
        if is_optimizer_factory(make):
            optimizer = make()(model, **kwargs)
            return optimizer
        groups: Any = self._parameter_groups(model)
        # GaLore and its like bring their own groups, LOMO wants the model.
        for key in ("params", "model", "optimizer_dict"):
            if key in kwargs:
                groups = kwargs.pop(key)
        if self._engine_config.master_dtype == "fp16" and "eps" in kwargs:
            kwargs["eps"] = _eps_in_fp16(kwargs["eps"])
        optimizer = make(groups, **kwargs)
        if "bitsandbytes" in str(make) and kwargs.get("optim_bits") == 8:
            _keep_embeddings_in_32_bits(model)
        return optimizer

    def _parameter_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        decayed = set(self.get_decay_parameter_names(model))
        trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        return [
            {
                "params": [p for name, p in trained if name in decayed],
                "weight_decay": self.args.weight_decay,
            },
            {"params": [p for name, p in trained if name not in decayed], "weight_decay": 0.0},
        ]

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Names of the parameters that weight decay applies to: all but biases and norms."""
        names: list[str] = get_parameter_names(model, [nn.LayerNorm], _NOT_DECAYED)
        return names

    @staticmethod
    def get_optimizer_cls_and_kwargs(
        args: TrainingArguments, model: nn.Module | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """The optimizer's class and keyword arguments that `args.optim` stands for."""
        handler = _OPTIMIZER_HANDLERS.get(args.optim)
        if handler is None:
            raise ValueError(f"Trainer cannot instantiate unsupported optimizer: {args.optim}")
        context = OptimizerContext(
            args=args,
            model=model,  # type: ignore[arg-type]  # any module will do
            optimizer_kwargs={"lr": args.learning_rate},
            adam_kwargs={"betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon},
            optim_args=_parse_optim_args(args.optim_args),
        )
        make, kwargs = handler(context)
        return make, kwargs

    def create_scheduler(
        self, num_training_steps: int, optimizer: Optimizer | None = None
    ) -> LRScheduler:
        """The schedule of `args.lr_scheduler_type`, unless one was given."""
        if self.lr_scheduler is None:
            scheduled: Any = self.optimizer if optimizer is None else optimizer
            kwargs: Any = self.args.lr_scheduler_kwargs
            self.lr_scheduler = get_scheduler(
                self.args.lr_scheduler_type,
                optimizer=scheduled,
                num_warmup_steps=self.args.get_warmup_steps(num_training_steps),
                num_training_steps=num_training_steps,
                scheduler_specific_kwargs=kwargs,
            )
            self._created_lr_scheduler = True
        scheduler: LRScheduler = self.lr_scheduler
        return scheduler

    def _follows_metric(self) -> bool:
        """True where the schedule steps after an evaluation, by its metric."""
        return isinstance(self.lr_scheduler, (ReduceLROnPlateau, GreedyLR))

    def _get_learning_rate(self) -> float:
        """The first group's learning rate."""
        if self._follows_metric() and self.optimizer is not None:
            rate = self.optimizer.param_groups[0]["lr"]
        else:
            rate = self.lr_scheduler.get_last_lr()[0]
        return float(rate.item()) if torch.is_tensor(rate) else rate


def _eps_in_fp16(eps: float) -> float:
    """`eps` where fp16 can hold it: a moment of zero divided by zero would be the end."""
    if torch.tensor(eps, dtype=torch.float16) > 0:
        return eps
    logger.warning(
        "adam_epsilon %g is 0 in fp16, which is all that fp16_opt_level O3 keeps: taking %g; set "
        "adam_epsilon for another",
        eps,
        _FP16_EPS,
    )
    return _FP16_EPS


def _keep_embeddings_in_32_bits(model: nn.Module) -> None:
    """bitsandbytes' own advice: 8-bit states of embeddings are unstable."""
    import bitsandbytes

    manager = bitsandbytes.optim.GlobalOptimManager.get_instance()
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            manager.register_module_override(module, "weight", {"optim_bits": 32})
