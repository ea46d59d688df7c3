"""What is done to a model before training, and its way into the engine."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase, ProcessorMixin
from transformers.debug_utils import DebugOption, DebugUnderflowOverflow
from transformers.integrations.liger import apply_liger_kernel
from transformers.integrations.neftune import activate_neftune, deactivate_neftune
from transformers.trainer_utils import (
    align_special_tokens,
    enable_full_determinism,
    set_seed,
)

from bigtrain.trainer.arguments import TrainingArguments
from bigtrain.translate.given_fsdp import recomputes

if TYPE_CHECKING:
    from bigtrain.trainer.loop import Loop
    from bigtrain.trainer.start import Start


def seed(args: TrainingArguments) -> None:
    """Seed every generator, and with `full_determinism` choose deterministic kernels."""
    if args.full_determinism:
        enable_full_determinism(args.seed)
    else:
        set_seed(args.seed)


def prepare_model(trainer: Loop) -> None:
    """What the arguments ask of the model itself: kernels, recomputation, tokens, noise."""
    args, model = trainer.args, trainer.model
    if args.use_liger_kernel:
        apply_liger_kernel(model, args.liger_kernel_config)
    if args.activation_checkpointing or recomputes(vars(args)):
        kwargs: Any = args.activation_checkpointing_kwargs or {}
        _checkpoint_activations(model, dict(kwargs))
    if isinstance(trainer.processing_class, (PreTrainedTokenizerBase, ProcessorMixin)) and hasattr(
        model, "config"
    ):
        align_special_tokens(model, trainer.processing_class)
    if args.neftune_noise_alpha is not None:
        trainer.neftune_hook_handle = activate_neftune(
            model, args.neftune_noise_alpha, trainer.accelerator
        )
    if DebugOption.UNDERFLOW_OVERFLOW in args.debug:
        DebugUnderflowOverflow(model)


def restore_model(trainer: Loop) -> None:
    """Take out what is for training alone."""
    if trainer.args.neftune_noise_alpha is not None:
        deactivate_neftune(trainer.model, trainer.neftune_hook_handle, trainer.accelerator)


def prepare_engine(trainer: Start, checkpoint: Path | None) -> None:
    """Make the optimizer, and give it and the model to the engine; once for both."""
    if checkpoint is not None and trainer._loads_before_preparing(checkpoint):
        trainer._load_from_checkpoint(checkpoint)
    trainer.create_optimizer()
    if trainer._is_prepared and trainer.engine.optimizer is trainer.optimizer:
        return
    wrapped = trainer.engine.prepare(trainer.model, trainer.optimizer)
    trainer.optimizer = trainer.engine.optimizer
    trainer._take_wrapped(_compiled(wrapped, trainer.args))


def _compiled(model: nn.Module, args: TrainingArguments) -> nn.Module:
    if not args.torch_compile:
        return model
    compiled: Any = torch.compile(
        model, backend=args.torch_compile_backend or "inductor", mode=args.torch_compile_mode
    )
    return compiled  # type: ignore[no-any-return]


def _checkpoint_activations(model: Any, kwargs: dict[str, Any]) -> None:
    # Two keys say which layers and where; the others are torch.utils.checkpoint's own.
    every, offload = kwargs.pop("every_n_layers", 1), kwargs.pop("offload", False)
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(
            activation_checkpointing_kwargs=kwargs or None, every_n_layers=every, offload=offload
        )
        return
    if not hasattr(model, "gradient_checkpointing_enable"):
        raise ValueError(
            f"{type(model).__name__} has no activation_checkpointing_enable; leave "
            "activation_checkpointing out"
        )
    warnings.warn(
        f"`{type(model).__name__}` only defines `gradient_checkpointing_enable`, which is "
        "deprecated; define `activation_checkpointing_enable`",
        FutureWarning,
        stacklevel=2,
    )
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs or None)
