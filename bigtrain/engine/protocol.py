"""What the training loop knows of an engine, and nothing more.

An engine turns a plain model and optimizer into ones that train on all ranks. The loop calls, for
every optimizer step:

    for each micro-batch:
        with engine.accumulating(last=...):
            loss = ...                      # the loop's own forward pass
            engine.backward(loss)
    result = engine.step(max_grad_norm, before_update=...)
    engine.zero_grad()

Gradients are **averaged over ranks and summed over micro-batches**, on every engine. A loss that
is a sum over N items of the whole global batch is therefore passed as `loss_sum * world_size / N`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

WEIGHT = "weight"
"""Kind of a trained or frozen parameter, in the precision that training keeps (fp32 masters)."""
BUFFER = "buffer"
"""Kind of a persistent buffer."""
# Every other kind is the optimizer's own name for a state: "exp_avg", "exp_avg_sq", "step", …


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What one optimizer step did. Tensors stay on the device; reading them is up to the loop."""

    grad_norm: Tensor | None
    """Global norm before clipping, 0-dim; None when it was not asked for."""
    skipped: bool
    """True when the fp16 gradients overflowed on any rank; the same on all ranks."""
    loss_scale: float | None
    """The fp16 loss scale after the step, else None."""


@dataclass(frozen=True, kw_only=True)
class LocalTensor:
    """This rank's contiguous piece of a named tensor.

    `data` is a 1-D tensor that shares memory with the live one, and holds elements
    [start, start + data.numel()) of the flattened tensor of `shape`.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    start: int
    data: Tensor
    owned: bool
    """True on the one rank that writes these elements to a checkpoint (no gap, no overlap)."""


class StateSource(Protocol):
    """Where a loaded state comes from. Nothing is read until it is asked for."""

    @property
    def param_groups(self) -> Sequence[Mapping[str, Any]] | None:
        """The optimizer's groups: hyperparameters, and `params` as names. None: weights only."""
        ...

    def kinds(self, name: str) -> Mapping[str, torch.dtype]:
        """The kinds that are there for a tensor, with their dtype; empty if it is unknown."""
        ...

    def shape(self, name: str, kind: str) -> tuple[int, ...]: ...

    def read_into(self, name: str, kind: str, start: int, out: Tensor) -> None:
        """Fill the 1-D `out` with elements [start, start + out.numel()), cast to its dtype."""
        ...


class Engine(Protocol):
    """One way of training a model on all ranks. All ranks call every method, in the same order."""

    name: str
    is_sharded: bool
    """True where a rank holds only a part of the weights or of the optimizer's state."""
    device: torch.device

    @property
    def optimizer(self) -> Optimizer | None:
        """The torch optimizer whose `param_groups` a scheduler drives; None before `prepare`."""
        ...

    def construct(
        self, make_model: Callable[[], nn.Module], make_skeleton: Callable[[], nn.Module]
    ) -> nn.Module:
        """The model to `prepare`. Where ranks will hold a part each, only rank 0 calls
        `make_model`; the others call `make_skeleton` (the same modules on the meta device) and
        get their part from rank 0. A model made whole on every rank may be prepared too."""
        ...

    def prepare(self, model: nn.Module, optimizer: Optimizer | None) -> nn.Module:
        """The callable model. Without an optimizer: for evaluation only.

        The optimizer was made on `model`'s parameters and has no state yet; where the engine
        replaces parameters, it puts the new ones into the optimizer's groups.
        """
        ...

    def accumulating(self, *, last: bool) -> AbstractContextManager[None]:
        """Around forward and backward of one micro-batch; `last` ends the accumulation window."""
        ...

    def autocast(self) -> AbstractContextManager[None]:
        """Around every forward pass: the compute precision where the engine leaves it to us."""
        ...

    def backward(self, loss: Tensor) -> None: ...

    def step(
        self, max_grad_norm: float | None, *, before_update: Callable[[], None] | None = None
    ) -> StepResult:
        """Unscale, clip, call `before_update`, update. None or 0: no clipping and no norm.

        DeepSpeed clips and updates in one go; there `before_update` comes before both.
        """
        ...

    def zero_grad(self) -> None: ...

    def gathered(self, params: Iterable[nn.Parameter]) -> AbstractContextManager[None]:
        """Inside, these parameters are whole on every rank (for export; don't change them).

        Read them from their modules: FSDP puts whole ones there and leaves those given as slices.
        """
        ...

    def full_weights(self) -> Iterator[tuple[str, Tensor | None]]:
        """Name and whole tensor on the CPU, one at a time; on other ranks than 0 the tensor is
        None. Names and precision as in `local_state` with kinds weight and buffer."""
        ...

    def local_state(self, *, optimizer: bool) -> Iterator[LocalTensor]:
        """This rank's pieces of weights and buffers, and of the optimizer's state."""
        ...

    def param_groups(self) -> list[dict[str, Any]]:
        """The optimizer's groups as plain values, with `params` a list of names."""
        ...

    def scaler_state(self) -> dict[str, Any]:
        """The loss scaler's plain values; empty without fp16."""
        ...

    def load_local_state(self, source: StateSource, *, optimizer: bool) -> None:
        """Fill weights, buffers and (with `optimizer`) its state and groups from `source`."""
        ...

    def load_scaler_state(self, state: Mapping[str, Any]) -> None: ...

    def close(self) -> None:
        """Give back what the engine holds. Safe to call twice."""
        ...
