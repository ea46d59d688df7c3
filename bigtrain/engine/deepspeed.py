"""DeepSpeed ZeRO: optimizer state (stage 1), gradients (2) and weights (3) cut over all ranks.

DeepSpeed reduces, clips and updates; its own configuration is given to us complete. Weights are
kept as flat fp32 masters (`zero_layout`); the model itself holds them in the compute precision.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from bigtrain.engine import precision, process_group, rank_zero, zero_layout
from bigtrain.engine.opaque import seat_of
from bigtrain.engine.protocol import LocalTensor, StateSource, StepResult
from bigtrain.engine.state import (
    load_groups,
    named_parameters,
    nothing_learns,
    optimized_names,
    plain_groups,
)
from bigtrain.engine.zero_state import ZeroState
from bigtrain.errors import ConfigError, UnsupportedError
from bigtrain.topology import RankInfo
from bigtrain.translate.config import DeepSpeedSettings, EngineConfig, unsaved


class DeepSpeedEngine:
    """ZeRO stage 1, 2 or 3, with the torch optimizer that it is given."""

    is_sharded = True

    def __init__(self, config: EngineConfig, *, world: RankInfo, device: torch.device) -> None:
        if not isinstance(config.settings, DeepSpeedSettings):
            raise ConfigError(f"engine {config.name} got {type(config.settings).__name__}")
        if config.compute_dtype == "fp16" and device.type == "cpu":
            raise UnsupportedError(
                f"engine {config.name}: DeepSpeed has no fp16 on a CPU; use bf16, or engine fsdp"
            )
        if why := unsaved(config):
            raise UnsupportedError(
                f"engine {config.name}: {why} can't be saved here; offload all of it to cpu"
            )
        self.name: str = config.name
        self.device = device
        self._config = config
        self._settings = config.settings
        self._world = world
        process_group.join(world, device=device)
        _start_deepspeed(world, device)
        self._model: nn.Module | None = None
        self._deepspeed: Any = None
        self._state: ZeroState | None = None
        self._names: list[list[str]] = []
        # First element and elements of what is rounded in the compute precision, until the
        # masters take them: DeepSpeed would start those from the rounded weights.
        self._fine: dict[str, tuple[int, Tensor]] = {}

    @property
    def optimizer(self) -> Optimizer | None:
        """The one whose groups the update reads, with DeepSpeed's wrapper taken off."""
        return self._state.optimizer if self._state is not None else None

    def construct(
        self, make_model: Callable[[], nn.Module], make_skeleton: Callable[[], nn.Module]
    ) -> nn.Module:
        return make_model() if self._world.is_main else make_skeleton()

    def prepare(self, model: nn.Module, optimizer: Optimizer | None) -> nn.Module:
        names = optimized_names(model, optimizer) if optimizer is not None else []
        if optimizer is not None and not _trains_any(optimizer):
            raise nothing_learns(model)
        self._release()
        self._spread(model)
        if optimizer is not None:
            parameters = named_parameters(model)
            for group, group_names in zip(optimizer.param_groups, names, strict=True):
                group["params"] = [parameters[name] for name in group_names]
        self._model = model
        if optimizer is None and self._settings.zero_stage < 3:
            # Stages 1 and 2 are about training only; there is nothing to cut.
            self._state = ZeroState(model, None, seat=seat_of(self.name, self._world), trains=False)
            return model
        return self._initialize(model, optimizer, names)

    def accumulating(self, *, last: bool) -> AbstractContextManager[None]:
        if self._deepspeed is not None:
            self._deepspeed.set_gradient_accumulation_boundary(last)
        return nullcontext()

    def autocast(self) -> AbstractContextManager[None]:
        if self._deepspeed is None:
            return precision.autocast(self._config, self.device)
        return nullcontext()  # the model itself is in the compute precision

    def backward(self, loss: Tensor) -> None:
        # Windows may be short, so that the division by their usual length is not DeepSpeed's.
        self._trained().backward(loss, scale_wrt_gas=False)

    def step(
        self, max_grad_norm: float | None, *, before_update: Callable[[], None] | None = None
    ) -> StepResult:
        """As the protocol says, except that `before_update` sees the gradients before clipping:
        DeepSpeed clips and updates in one go."""
        engine = self._trained()
        zero = engine.optimizer
        zero.clip_grad = max_grad_norm or 0.0
        if before_update is not None:
            before_update()
        engine.step()
        norm = engine.get_global_grad_norm() if max_grad_norm else None
        return StepResult(
            grad_norm=None if norm is None else torch.as_tensor(norm, dtype=torch.float32),
            skipped=bool(zero.overflow),
            loss_scale=zero.loss_scaler.cur_scale if self._is_fp16 else None,
        )

    def zero_grad(self) -> None:
        for parameter in self._held().parameters.values():
            parameter.grad = None

    @contextmanager
    def gathered(self, params: Iterable[nn.Parameter]) -> Iterator[None]:
        if self._settings.zero_stage < 3 or self._deepspeed is None:
            yield
            return
        import deepspeed

        with deepspeed.zero.GatheredParameters(list(params)):
            yield

    def full_weights(self) -> Iterator[tuple[str, Tensor | None]]:
        yield from self._held().whole_weights()

    def local_state(self, *, optimizer: bool) -> Iterator[LocalTensor]:
        state = self._held()
        yield from state.weights()
        if optimizer:
            yield from state.moments()

    def param_groups(self) -> list[dict[str, Any]]:
        return plain_groups(self._trained().optimizer.optimizer, self._names)

    def load_local_state(self, source: StateSource, *, optimizer: bool) -> None:
        state = self._held()
        if optimizer:
            load_groups(self._trained().optimizer.optimizer, self._names, source)
            state.load_moments(source)
        state.load_weights(source)

    def scaler_state(self) -> dict[str, Any]:
        if not self._is_fp16:
            return {}
        scaler = self._trained().optimizer.loss_scaler
        return {"scale": scaler.cur_scale, **{key: getattr(scaler, key) for key in _SCALER_KEYS}}

    def load_scaler_state(self, state: Mapping[str, Any]) -> None:
        if not self._is_fp16 or not state:
            return
        scaler = self._trained().optimizer.loss_scaler
        scaler.cur_scale = state["scale"]
        for key in _SCALER_KEYS & state.keys():
            setattr(scaler, key, state[key])

    def close(self) -> None:
        self._release()
        self._model = self._state = None

    @property
    def _is_fp16(self) -> bool:
        return self._config.compute_dtype == "fp16"

    def _spread(self, model: nn.Module) -> None:
        """Give every rank rank 0's weights: all of them, or with stage 3 its slice of each."""
        compute = precision.torch_dtype(self._config.compute_dtype)
        if not any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
            rank_zero.check_same(model)
            # DeepSpeed itself turns a model into bf16 or fp16, and never into fp32.
            master = compute if compute is torch.float32 else None
            spreader = rank_zero.Spreader(self.device, master_dtype=master)
            if self._settings.zero_stage < 3:
                spreader.fill(model)
            else:
                self._cut(model, spreader, compute)
        if self._settings.zero_stage < 3:
            self._fine = {
                name: (0, parameter.detach().clone().view(-1))
                for name, parameter in named_parameters(model).items()
                if _is_finer(parameter.dtype, compute)
            }

    def _cut(self, model: nn.Module, spreader: rank_zero.Spreader, compute: torch.dtype) -> None:
        """Stage 3: as each parameter arrives, keep this rank's slice of it."""
        import deepspeed

        scalars = [name for name, one in named_parameters(model).items() if one.ndim == 0]
        if scalars:
            raise UnsupportedError(
                f"DeepSpeed can't cut parameters without dims ({', '.join(scalars)}); use engine "
                "zero2 or ddp"
            )
        cutter = deepspeed.zero.Init(config_dict_or_path=dict(self._settings.json), dtype=compute)
        fine: dict[int, tuple[int, Tensor]] = {}
        for parameter in spreader.parameters(model):
            arrived = parameter.detach()
            if parameter.is_floating_point():
                parameter.data = arrived.to(compute)
            cutter._convert_to_zero_parameters([parameter])
            if _is_finer(arrived.dtype, compute):
                start, slice_ = zero_layout.stage3_slice(parameter)
                whole = arrived.view(-1)
                fine[id(parameter)] = start, whole[start : start + slice_.numel()].clone()
        self._fine = {
            name: fine[id(parameter)]
            for name, parameter in named_parameters(model).items()
            if id(parameter) in fine
        }

    def _initialize(
        self, model: nn.Module, optimizer: Optimizer | None, names: list[list[str]]
    ) -> nn.Module:
        import deepspeed

        with _scalars_can_be_broadcast():
            self._deepspeed, _, _, _ = deepspeed.initialize(
                model=model,
                optimizer=optimizer,
                config=dict(self._settings.json),
                dist_init_required=False,
            )
        self._state = ZeroState(
            model,
            self._deepspeed.optimizer,
            seat=seat_of(self.name, self._world),
            trains=optimizer is not None,
        )
        if optimizer is not None:
            # DeepSpeed drops the groups that hold nothing to train.
            trained = {name for group in self._state.groups for name in group.names}
            self._names = [group for group in names if trained.intersection(group)]
            self._state.fill_masters(self._fine)
            self._fine = {}
        return self._deepspeed  # type: ignore[no-any-return]

    def _release(self) -> None:
        if self._deepspeed is not None:
            self._deepspeed.destroy()
            self._deepspeed = None

    def _held(self) -> ZeroState:
        if self._state is None:
            raise RuntimeError(f"engine {self.name} holds no model; call prepare first")
        return self._state

    def _trained(self) -> Any:
        if self.optimizer is None:
            raise RuntimeError(f"engine {self.name} was prepared without an optimizer")
        return self._deepspeed


def _trains_any(optimizer: Optimizer) -> bool:
    groups = (group["params"] for group in optimizer.param_groups)
    return any(parameter.requires_grad for group in groups for parameter in group)


# What DeepSpeed's dynamic loss scale knows besides the scale itself.
_SCALER_KEYS = {"cur_iter", "last_overflow_iter", "cur_hysteresis"}


def _is_finer(dtype: torch.dtype, compute: torch.dtype) -> bool:
    return dtype.is_floating_point and dtype.itemsize > compute.itemsize


def _start_deepspeed(world: RankInfo, device: torch.device) -> None:
    """Let DeepSpeed use the process group that is there."""
    # The only way to tell DeepSpeed its local rank; launchers other than torchrun's kin don't.
    os.environ.setdefault("LOCAL_RANK", str(world.local_rank))
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    if (used := get_accelerator().device_name()) != device.type:
        raise ConfigError(
            f"DeepSpeed took {used} for its device, this run uses {device.type}; "
            f"set DS_ACCELERATOR={device.type}"
        )
    # A reduction for inference on CPUs, which training never calls. DeepSpeed would compile it at
    # its first start, which takes a compiler and most of a minute, and a lock that a killed
    # compilation leaves behind makes every later start wait for ever.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)


@contextmanager
def _scalars_can_be_broadcast() -> Iterator[None]:
    """DeepSpeed 0.19 sends parameters as bytes, and a tensor without dims (CLIP's `logit_scale`)
    can't be viewed as such: meanwhile it has one."""
    from deepspeed.runtime.engine import DeepSpeedEngine

    broadcast = DeepSpeedEngine._broadcast_model

    def broadcast_scalars_too(engine: Any) -> None:
        scalars = [parameter for parameter in engine.module.parameters() if parameter.ndim == 0]
        for parameter in scalars:
            parameter.data = parameter.data.view(1)
        broadcast(engine)
        for parameter in scalars:
            parameter.data = parameter.data.view(())

    DeepSpeedEngine._broadcast_model = broadcast_scalars_too
    try:
        yield
    finally:
        DeepSpeedEngine._broadcast_model = broadcast
