"""What a model is, asked once: how its loss counts items, which inputs are labels, its dtypes."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss
from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES
from transformers.trainer_utils import unwrap_peft_model, validate_quantization_for_training
from transformers.utils.generic import can_return_loss, find_labels


@dataclass(frozen=True, kw_only=True)
class ModelFacts:
    """What the loop must know of a model."""

    accepts_loss_kwargs: bool
    """True where `forward` takes `num_items_in_batch` and normalises its loss by it."""
    declares_loss_kwargs: bool
    """True where the model itself says so; else it follows from a `**kwargs`."""
    label_names: list[str]
    can_return_loss: bool
    loss_shifts_labels: bool
    """True where position 0 of a row is never a target (the loss of a causal language model)."""


def inspect_model(model: nn.Module) -> ModelFacts:
    """The facts of a model that was checked by `check_trainable`."""
    base = unwrap_peft_model(model)
    is_encoder_decoder = getattr(getattr(base, "config", None), "is_encoder_decoder", False)
    loss = LOSS_MAPPING.get(str(getattr(base, "loss_type", None)))
    return ModelFacts(
        accepts_loss_kwargs=_accepts_loss_kwargs(base),
        declares_loss_kwargs=getattr(base, "accepts_loss_kwargs", None) is not None,
        label_names=find_labels(base.__class__),
        can_return_loss=bool(can_return_loss(base.__class__)),
        loss_shifts_labels=loss is ForCausalLMLoss and not is_encoder_decoder,
    )


def check_is_module(model: Any, *, source: str) -> None:
    """Raises TypeError for what is no model, such as a model's name or its class."""
    if isinstance(model, nn.Module):
        return
    if isinstance(model, type):
        found = f"the class {model.__name__}: give an instance of it"
    elif isinstance(model, str):
        found = f"the string {model!r}: give what `from_pretrained` loads"
    else:
        found = f"a {type(model).__name__}"
    raise TypeError(f"{source} must be an nn.Module, not {found}")


def check_trainable(model: nn.Module) -> None:
    """Raises ValueError for a model without a head, or one quantised so that it can't learn."""
    name = model.__class__.__name__
    if name in MODEL_MAPPING_NAMES:
        raise ValueError(
            f"The model you have picked ({name}) cannot be used as is for training: it only "
            "computes hidden states and does not accept any labels. You should choose a model "
            "with a head suitable for your task like any of the `AutoModelForXxx` listed at "
            "https://huggingface.co/docs/transformers/model_doc/auto"
        )
    validate_quantization_for_training(model)


def original_dtypes(model: nn.Module) -> dict[str, torch.dtype]:
    """Name → dtype of weights and buffers, before an engine keeps some of them in fp32."""
    tensors: dict[str, Any] = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {name: tensor.dtype for name, tensor in tensors.items()}


def is_spread(model: nn.Module, device: torch.device) -> bool:
    """Whether a `device_map` has put it on several devices, or on another one than `device`."""
    placed = set((getattr(model, "hf_device_map", None) or {}).values()) - {"cpu", "disk"}
    return len(placed) > 1 or any(torch.device(place) != device for place in placed)


def can_be_moved(model: nn.Module) -> bool:
    """Not one that bitsandbytes quantised, nor one without its weights."""
    on_meta = any(parameter.is_meta for parameter in model.parameters())
    return getattr(model, "quantization_method", None) != "bitsandbytes" and not on_meta


def hidden_size(model: nn.Module | None) -> int | None:
    """Width of the model, where its config tells."""
    config = getattr(model, "config", None)
    size = getattr(config, "hidden_size", None)
    return size if isinstance(size, int) else None


def _accepts_loss_kwargs(model: nn.Module) -> bool:
    declared = getattr(model, "accepts_loss_kwargs", None)
    if declared is not None:
        return bool(declared)
    parameters = inspect.signature(model.forward).parameters.values()
    return any(parameter.kind == inspect.Parameter.VAR_KEYWORD for parameter in parameters)
