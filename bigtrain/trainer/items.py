"""Whether a model's loss is divided by `num_items_in_batch`, or only said to take it.

A `forward(**kwargs)` swallows the count without a word. T5's loss, for one, stays the mean of its
own micro-batch; taken for normalised, it would be multiplied by the number of ranks.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# What a wrapper or a model does to any input on its way; no arithmetic of a loss.
_CARRIED = {
    "to",
    "_to_copy",
    "float",
    "half",
    "bfloat16",
    "double",
    "detach",
    "clone",
    "contiguous",
    "cuda",
    "cpu",
    "size",
    "dim",
    "numel",
    "is_floating_point",
    "is_complex",
    "__get__",
    "requires_grad_",
    "record_stream",
}


class WatchedCount(Tensor):
    """The count as a tensor that knows whether anything was computed with it."""

    was_used: list[bool]

    @staticmethod
    def of(count: Tensor | int) -> WatchedCount:
        """`count`, watched from now on."""
        watched = torch.as_tensor(count).as_subclass(WatchedCount)
        watched.was_used = []
        return watched

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        watched = [arg for arg in _flat(args, kwargs) if isinstance(arg, WatchedCount)]
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **(kwargs or {}))
        if getattr(func, "__name__", "") not in _CARRIED:
            for one in watched:
                one.was_used.append(True)
        elif watched and isinstance(result, Tensor):
            carried = result.as_subclass(WatchedCount)
            carried.was_used = watched[0].was_used
            return carried
        return result


def _flat(args: Any, kwargs: dict[str, Any] | None) -> list[Any]:
    values = [*args, *(kwargs or {}).values()]
    return [
        inner
        for value in values
        for inner in (value if isinstance(value, (tuple, list)) else (value,))
    ]
