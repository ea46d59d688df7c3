"""Whole parameters that compute in another precision than they are kept in: fp16 levels O2 and O3.

While a model's `forward` runs, every module finds its weights cast where it looks for them; what
the optimizer, the reduction over ranks and the checkpoint see stays as it is kept. Gradients
arrive through the cast. FSDP and DeepSpeed do the same when they gather, and don't need it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

# Their statistics are sums over a batch, which fp16 does not hold.
_KEPT = nn.modules.batchnorm._BatchNorm


# The model remembers its caster: another trainer of the same model may want none.
_PLACE = "_bigtrain_weight_caster"


def cast_weights(model: nn.Module, dtype: torch.dtype | None) -> None:
    """Let `model` compute in `dtype` from now on, or (None) in what it is kept in."""
    caster: WeightCaster | None = model.__dict__.pop(_PLACE, None)
    if caster is not None:
        caster.remove()
    if dtype is not None:
        model.__dict__[_PLACE] = WeightCaster(model, dtype)


class WeightCaster:
    """Gives `model`, and each part of it that is called by itself, weights and floating-point
    inputs in `dtype`.

    A part is called by itself when activation checkpointing computes it anew, or `generate` an
    encoder.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._depth = 0
        self._placed: list[tuple[nn.Module, str]] = []
        self._hooks = [
            hook
            for module in model.modules()
            for hook in (
                module.register_forward_pre_hook(self._enter, with_kwargs=True),
                module.register_forward_hook(self._leave, always_call=True),
            )
        ]

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def _enter(self, module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        self._depth += 1
        if self._depth > 1:
            return None
        self._place(module)
        return tree_map(self._cast, args), tree_map(self._cast, kwargs)

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        self._depth -= 1
        if self._depth == 0:
            while self._placed:
                owner, name = self._placed.pop()
                del owner.__dict__[name]

    def _place(self, root: nn.Module) -> None:
        """An attribute of the instance hides the parameter of that name, which stays registered."""
        cast: dict[int, Tensor] = {}  # by the parameter's identity: tied ones stay one
        for module in root.modules():
            for name, parameter in module._parameters.items():
                if parameter is None or isinstance(module, _KEPT):
                    continue
                if id(parameter) not in cast:
                    cast[id(parameter)] = self._cast(parameter)
                module.__dict__[name] = cast[id(parameter)]
                self._placed.append((module, name))

    def _cast(self, value: Any) -> Any:
        if isinstance(value, Tensor) and value.is_floating_point():
            return value.to(self._dtype)
        return value
