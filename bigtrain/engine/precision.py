"""Which precision each number has: kept between steps, computed in, and scaled against underflow.

Trained parameters are kept as fp32 masters while the arithmetic is bf16 or fp16: an update of
a hundred-thousandth of a weight vanishes in bf16's 8 bits. Only fp16 level O3 keeps none. Frozen
parameters get no updates and keep their dtype.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from bigtrain.translate.config import DTypeName, EngineConfig

_DTYPES: dict[str, torch.dtype] = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}


def torch_dtype(name: DTypeName) -> torch.dtype:
    """The dtype that a config's word stands for."""
    return _DTYPES[name]


def keep_masters(model: nn.Module, dtype: torch.dtype) -> None:
    """Turn the trained parameters into `dtype` in place: an optimizer made on them stays right.

    A model in float64 stays what it was made, unless its masters are to be less than fp32.
    """
    for parameter in model.parameters():
        is_exact = parameter.dtype == torch.float64 and dtype == torch.float32
        if parameter.requires_grad and parameter.is_floating_point() and not is_exact:
            parameter.data = parameter.data.to(dtype)


def autocast(config: EngineConfig, device: torch.device) -> AbstractContextManager[None]:
    """Forward passes in the compute precision, for engines that keep whole fp32 parameters."""
    if config.compute_dtype == "fp32" or config.casts_weights:
        return nullcontext()
    return torch.autocast(device.type, dtype=torch_dtype(config.compute_dtype))


class _Fp16Scaler(torch.amp.GradScaler):
    """torch's, which takes gradients in fp16 for a mistake: here they have no other precision."""

    def _unscale_grads_(
        self, optimizer: Optimizer, inv_scale: Tensor, found_inf: Tensor, allow_fp16: bool
    ) -> dict[torch.device, Tensor]:
        return super()._unscale_grads_(optimizer, inv_scale, found_inf, True)


class LossScaler:
    """The dynamic loss scale of fp16, on top of torch's; does nothing in other precisions.

    Overflow is agreed on by all ranks without a word of ours: DDP averages an infinity into every
    rank's gradient, and on sharded gradients torch reduces the finding over their mesh.
    """

    def __init__(self, config: EngineConfig, device: torch.device) -> None:
        kind = _Fp16Scaler if config.master_dtype == "fp16" else torch.amp.GradScaler
        self._torch = kind(device.type, enabled=config.compute_dtype == "fp16")

    @property
    def enabled(self) -> bool:
        return bool(self._torch.is_enabled())

    def scale(self, loss: Tensor) -> Tensor:
        return self._torch.scale(loss)

    def unscale(self, optimizer: Optimizer) -> None:
        self._torch.unscale_(optimizer)

    def update(self, optimizer: Optimizer) -> tuple[bool, float | None]:
        """Step unless the gradients overflowed: whether it was skipped, and the scale from now on.

        With fp16 this waits for the device: the schedule must know whether a step was taken.
        """
        if not self.enabled:
            optimizer.step()
            return False, None
        before = self._torch.get_scale()
        self._torch.step(optimizer)
        self._torch.update()
        after = self._torch.get_scale()
        # torch shrinks the scale exactly when it found an infinity; growing never shrinks it.
        return after < before, after

    def state(self) -> dict[str, float]:
        return dict(self._torch.state_dict())

    def load_state(self, state: dict[str, float]) -> None:
        if self.enabled and state:
            # Of another engine's scaler, what both have: the scale itself.
            mine = self._torch.state_dict()
            self._torch.load_state_dict({key: state.get(key, mine[key]) for key in mine})
