"""`jit_mode_eval`: evaluation through `torch.jit.trace`, where a model can be traced."""

from __future__ import annotations

import inspect
import logging
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import nn
from torch.utils.data import DataLoader

logger = logging.getLogger(__name__)


def traced(model: nn.Module, dataloader: DataLoader[Any], *, device: torch.device) -> nn.Module:
    """The model as traced on the loader's first batch; the model itself where that fails."""
    batch = next(iter(dataloader), None)
    if not isinstance(batch, dict):
        logger.warning("jit_mode_eval: batches are not dicts; evaluating without it")
        return model
    example = send_to_device(batch, device)
    parameters = inspect.signature(model.forward).parameters
    example = {name: value for name, value in example.items() if name in parameters}
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            jitted = torch.jit.trace(model, example_kwarg_inputs=example, strict=False)
            jitted(**example)
    except Exception as error:  # whatever a model's own code raises under tracing
        logger.warning(
            "jit_mode_eval: the model can't be traced (%s); evaluating without it", error
        )
        return model
    finally:
        model.train(was_training)
    return _Traced(jitted, model)


class _Traced(nn.Module):
    """A traced model that still answers for the original's attributes and modes."""

    def __init__(self, jitted: Any, original: nn.Module) -> None:
        super().__init__()
        self._jitted = jitted
        self._original = [original]
        self._names = set(inspect.signature(original.forward).parameters)

    def forward(self, **inputs: Any) -> Any:
        # A trace takes the inputs that it was made with, and none that count items.
        inputs.pop("num_items_in_batch", None)
        return self._jitted(**inputs)
