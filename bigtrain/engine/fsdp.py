"""FSDP2: every rank holds a slice of each parameter, and gathers one layer at a time to compute.

Each parameter becomes a DTensor that is cut along its first dimension, so that a rank's slice is
one contiguous range of it. The model is filled from rank 0 and cut layer by layer: no other rank
ever holds more than one whole layer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.optim import Optimizer

from bigtrain.engine import precision, process_group, rank_zero
from bigtrain.engine.layers import find_layers
from bigtrain.engine.protocol import StateSource
from bigtrain.engine.state import Placement, named_parameters, optimized_names, whole
from bigtrain.engine.torch_engine import TorchEngine
from bigtrain.errors import ConfigError, UnsupportedError
from bigtrain.topology import RankInfo
from bigtrain.translate.config import EngineConfig, FsdpSettings


class FsdpEngine(TorchEngine):
    """torch's `fully_shard`, over all ranks or (hybrid) within groups of `shard_size` ranks."""

    is_sharded = True

    def __init__(self, config: EngineConfig, *, world: RankInfo, device: torch.device) -> None:
        super().__init__(config, world=world, device=device)
        if not isinstance(config.settings, FsdpSettings):
            raise ConfigError(f"engine fsdp got {type(config.settings).__name__}")
        self._settings = config.settings
        process_group.join(world, device=device)
        self._mesh = _make_mesh(config.settings.shard_size, world, device)
        self._root: FSDPModule | None = None

    def construct(
        self, make_model: Callable[[], nn.Module], make_skeleton: Callable[[], nn.Module]
    ) -> nn.Module:
        return make_model() if self._world.is_main else make_skeleton()

    def prepare(self, model: nn.Module, optimizer: Optimizer | None) -> nn.Module:
        if not isinstance(model, FSDPModule):
            names = optimized_names(model, optimizer) if optimizer is not None else []
            self._shard(model)
            if optimizer is not None:
                _point_at(optimizer, names, named_parameters(model))
        self._hold(model, optimizer)
        self._root = model  # type: ignore[assignment]  # fully_shard changed its class
        return model

    def autocast(self) -> AbstractContextManager[None]:
        return nullcontext()  # parameters are gathered in the compute precision already

    @contextmanager
    def accumulating(self, *, last: bool) -> Iterator[None]:
        if self._root is None:
            raise RuntimeError("engine fsdp holds no model; call prepare first")
        self._root.set_requires_gradient_sync(last or self._settings.reduce_each_micro_batch)
        self._root.set_is_last_backward(last)
        yield

    @contextmanager
    def gathered(self, params: Iterable[nn.Parameter]) -> Iterator[None]:
        """Whole parameters appear on their modules: the DTensors given stay slices."""
        wanted = {id(parameter) for parameter in params}
        units = [unit for unit in self._units() if wanted & {id(p) for p in _own_parameters(unit)}]
        for unit in units:
            unit.unshard()
        try:
            yield
        finally:
            for unit in units:
                unit.reshard()

    def full_weights(self) -> Iterator[tuple[str, Tensor | None]]:
        state = self._held()
        for name, parameter in (state.parameters | state.buffers).items():
            tensor = parameter.detach()
            if isinstance(tensor, DTensor):
                tensor = tensor.to(self.device).full_tensor()  # type: ignore[attr-defined]
            yield name, tensor.cpu() if self._world.is_main else None

    def load_local_state(self, source: StateSource, *, optimizer: bool) -> None:
        # Layers that a forward pass left gathered would go on with what they had.
        for unit in self._units():
            unit.reshard()
        super().load_local_state(source, optimizer=optimizer)

    def close(self) -> None:
        super().close()
        self._root = None

    def _shard(self, model: nn.Module) -> None:
        _refuse_scalars(model)
        rank_zero.check_same(model)
        spreader = rank_zero.Spreader(
            self.device, master_dtype=precision.torch_dtype(self._config.master_dtype)
        )
        policy = MixedPrecisionPolicy(
            param_dtype=precision.torch_dtype(self._config.compute_dtype),
            reduce_dtype=precision.torch_dtype(self._config.reduce_dtype),
        )
        offload = CPUOffloadPolicy() if self._settings.cpu_offload else OffloadPolicy()
        for unit in [*find_layers(model, self._settings.wrap_classes), model]:
            spreader.fill(unit)
            fully_shard(
                unit,
                mesh=self._mesh,
                mp_policy=policy,
                offload_policy=offload,
                # The root's parameters are the first that the backward pass needs again.
                reshard_after_forward=self._settings.reshard_after_forward and unit is not model,
            )
        self._prefetch(model)
        # Without a backward pass nothing would cut the root again, and a later update would be
        # missing from what it kept gathered.
        model.register_forward_hook(_reshard_after_evaluation)
        if hasattr(model, "generate"):
            # It calls parts of the model (an encoder) past the root's forward.
            register_fsdp_forward_method(model, "generate")

    def _prefetch(self, model: nn.Module) -> None:
        """Let each layer start to gather the next ones before it computes."""
        ahead = self._settings.forward_prefetch
        layers: list[FSDPModule] = [
            unit for unit in model.modules() if isinstance(unit, FSDPModule) and unit is not model
        ]
        for index, layer in enumerate(layers if ahead else ()):
            layer.set_modules_to_forward_prefetch(layers[index + 1 : index + 1 + ahead])

    def _units(self) -> list[FSDPModule]:
        if self._model is None:
            return []
        return [module for module in self._model.modules() if isinstance(module, FSDPModule)]

    def _place(self, tensor: Tensor) -> Placement:
        if not isinstance(tensor, DTensor):
            return whole(tensor, owned=self._world.is_main)
        _, offset = compute_local_shape_and_global_offset(
            tensor.shape, tensor.device_mesh, tensor.placements
        )
        return Placement(
            shape=tuple(tensor.shape),
            start=offset[0] * math.prod(tensor.shape[1:]),
            local=tensor.to_local().detach(),
            owned=_is_first_replica(tensor.device_mesh),
        )

    def _clip(self, max_norm: float) -> Tensor:
        """As torch's `clip_grad_norm_`, on the slices: its own takes a DTensor operation for each
        parameter, and leaves the norm unreduced."""
        grads = [
            parameter.grad.to_local() if isinstance(parameter.grad, DTensor) else parameter.grad
            for parameter in self._held().parameters.values()
            if parameter.grad is not None
        ]
        grads = [grad for grad in grads if grad.numel()]
        square = nn.utils.get_total_norm(grads).to(self.device).square()
        dist.all_reduce(square, group=self._mesh.get_group(self._mesh.ndim - 1))
        norm = square.sqrt()
        coefficient = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        if grads:
            torch._foreach_mul_(grads, coefficient.to(grads[0].device))
        return norm


def _make_mesh(shard_size: int, world: RankInfo, device: torch.device) -> DeviceMesh:
    """One axis, or replicate by shard, where neighbouring ranks share a copy of the model."""
    if shard_size == world.world_size:
        return init_device_mesh(device.type, (shard_size,), mesh_dim_names=("shard",))
    return init_device_mesh(
        device.type,
        (world.world_size // shard_size, shard_size),
        mesh_dim_names=("replicate", "shard"),
    )


def _point_at(
    optimizer: Optimizer, names: list[list[str]], parameters: dict[str, nn.Parameter]
) -> None:
    """Let the optimizer's groups hold the sharded parameters in place of the whole ones."""
    for group, group_names in zip(optimizer.param_groups, names, strict=True):
        group["params"] = [parameters[name] for name in group_names]


def _refuse_scalars(model: nn.Module) -> None:
    scalars = [name for name, parameter in model.named_parameters() if parameter.ndim == 0]
    if scalars:
        raise UnsupportedError(
            f"engine fsdp can't shard parameters without a dimension: {', '.join(scalars)}; "
            "give them shape (1,), or use engine ddp or zero2"
        )


def _own_parameters(unit: FSDPModule) -> Iterator[Tensor]:
    for group in unit._get_fsdp_state()._fsdp_param_groups:
        for parameter in group.fsdp_params:
            yield parameter.sharded_param


def _is_first_replica(mesh: DeviceMesh) -> bool:
    return mesh.ndim == 1 or mesh.get_local_rank(0) == 0


def _reshard_after_evaluation(module: nn.Module, inputs: object, output: object) -> None:
    if not torch.is_grad_enabled():
        module.reshard()  # type: ignore[operator]
