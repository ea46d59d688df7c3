"""What the engines share that leave the optimizer's step to torch: `single`, `ddp` and `fsdp`.

As it stands, every rank holds the whole model and the whole optimizer, and rank 0's is saved.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from bigtrain.engine import casting, precision
from bigtrain.engine.opaque import seat_of
from bigtrain.engine.protocol import LocalTensor, StateSource, StepResult
from bigtrain.engine.state import Placement, TrainingState, whole
from bigtrain.topology import RankInfo
from bigtrain.translate.config import EngineConfig


class TorchEngine:
    """Trains with a torch optimizer whose state lies beside the parameters."""

    is_sharded = False

    def __init__(self, config: EngineConfig, *, world: RankInfo, device: torch.device) -> None:
        self.name: str = config.name
        self.device = device
        self._config = config
        self._world = world
        self._scaler = precision.LossScaler(config, device)
        self._model: nn.Module | None = None
        self._state: TrainingState | None = None

    @property
    def optimizer(self) -> Optimizer | None:
        return self._state.optimizer if self._state is not None else None

    def construct(
        self, make_model: Callable[[], nn.Module], make_skeleton: Callable[[], nn.Module]
    ) -> nn.Module:
        return make_model()

    def prepare(self, model: nn.Module, optimizer: Optimizer | None) -> nn.Module:
        if optimizer is not None:
            precision.keep_masters(model, precision.torch_dtype(self._config.master_dtype))
        # Moving a module keeps its Parameter objects, so the optimizer's groups stay right.
        model.to(self.device)
        casting.cast_weights(model, self._cast_dtype())
        self._hold(model, optimizer)
        return model

    def accumulating(self, *, last: bool) -> AbstractContextManager[None]:
        return nullcontext()

    def autocast(self) -> AbstractContextManager[None]:
        return precision.autocast(self._config, self.device)

    def backward(self, loss: Tensor) -> None:
        self._scaler.scale(loss).backward()  # type: ignore[no-untyped-call]

    def step(
        self, max_grad_norm: float | None, *, before_update: Callable[[], None] | None = None
    ) -> StepResult:
        optimizer = self._held().optimizer
        if optimizer is None:
            raise RuntimeError(f"engine {self.name} was prepared without an optimizer")
        if self._scaler.enabled:
            self._scaler.unscale(optimizer)
        grad_norm = self._clip(max_grad_norm) if max_grad_norm else None
        if before_update is not None:
            before_update()
        skipped, loss_scale = self._scaler.update(optimizer)
        return StepResult(grad_norm=grad_norm, skipped=skipped, loss_scale=loss_scale)

    def zero_grad(self) -> None:
        for parameter in self._held().parameters.values():
            parameter.grad = None

    def gathered(self, params: Iterable[nn.Parameter]) -> AbstractContextManager[None]:
        return nullcontext()

    def full_weights(self) -> Iterator[tuple[str, Tensor | None]]:
        for piece in self._held().weights():
            tensor = piece.data.view(piece.shape).cpu() if self._world.is_local_main else None
            yield piece.name, tensor

    def local_state(self, *, optimizer: bool) -> Iterator[LocalTensor]:
        state = self._held()
        yield from state.weights()
        if optimizer:
            yield from state.moments()

    def param_groups(self) -> list[dict[str, Any]]:
        return self._held().groups()

    def load_local_state(self, source: StateSource, *, optimizer: bool) -> None:
        state = self._held()
        state.load_weights(source)
        if optimizer:
            state.load_moments(source)

    def scaler_state(self) -> dict[str, Any]:
        return self._scaler.state()

    def load_scaler_state(self, state: Mapping[str, Any]) -> None:
        self._scaler.load_state(dict(state))

    def close(self) -> None:
        self._model = self._state = None

    def _hold(self, model: nn.Module, optimizer: Optimizer | None) -> None:
        self._model = model
        self._state = TrainingState(
            model, optimizer, place=self._place, seat=seat_of(self.name, self._world)
        )

    def _cast_dtype(self) -> torch.dtype | None:
        """At fp16 levels O2 and O3 the model itself computes with fp16 weights."""
        config = self._config
        return precision.torch_dtype(config.compute_dtype) if config.casts_weights else None

    def _held(self) -> TrainingState:
        if self._state is None:
            raise RuntimeError(f"engine {self.name} holds no model; call prepare first")
        return self._state

    def _place(self, tensor: Tensor) -> Placement:
        return whole(tensor, owned=self._world.is_main)

    def _clip(self, max_norm: float) -> Tensor:
        """The global norm of all gradients, which are scaled down where it exceeds `max_norm`."""
        return nn.utils.clip_grad_norm_(self._held().parameters.values(), max_norm)
