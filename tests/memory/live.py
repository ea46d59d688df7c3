"""What an engine really holds: the storages of its live tensors, by what they are for."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from bigtrain.engine import build_engine
from bigtrain.engine.protocol import Engine
from bigtrain.memory.shapes import Parameter
from bigtrain.memory.state import StateBytes
from bigtrain.topology import RankInfo
from bigtrain.translate.config import EngineConfig

CPU = torch.device("cpu")


def measure(engine: Engine, model: nn.Module) -> StateBytes:
    """The bytes after a backward pass that followed a step. DDP's buckets are torch's own, in C++,
    and DeepSpeed's small buffers are not the engine's state; neither is counted."""
    inner = model.module if hasattr(model, "module") else model
    parameters = list(inner.parameters())
    zero = getattr(getattr(engine, "_deepspeed", None), "optimizer", None)
    optimizer: Any = engine.optimizer
    masters = [p for group in optimizer.param_groups for p in group["params"]]
    masters += list(getattr(zero, "fp32_partitioned_groups_flat", ()))
    counted: set[int] = set()

    def count(tensors: Iterable[Tensor | None]) -> int:
        return sum(_bytes(tensor, counted) for tensor in tensors if tensor is not None)

    return StateBytes(
        weights=count([*(getattr(p, "ds_tensor", None) for p in parameters), *parameters]),
        masters=count(masters),
        gradients=count(
            [
                *(p.grad for p in parameters),
                *(getattr(p, "grad_accum", None) for p in parameters),
                *(p.grad for p in masters),
                *_tensors(getattr(zero, "averaged_gradients", None)),
                *_tensors(getattr(zero, "fp32_groups_gradients_flat", None)),
                getattr(zero, "grad_partitions_flat_buffer", None),
            ]
        ),
        optimizer=count(
            value
            for state in optimizer.state.values()
            for value in state.values()
            if isinstance(value, Tensor)
        ),
        buffers=count(
            bucket.buffer
            for bucket in getattr(zero, "ipg_buckets", {}).values()
            if isinstance(bucket.buffer, Tensor)
        ),
    )


def train_to_gradients(
    world: RankInfo, config: EngineConfig, make_model: Any, *, trained: Any = None
) -> tuple[Engine, nn.Module, int]:
    """One step and one more backward pass; the engine, its model and the parameter count."""
    engine = build_engine(config, world=world, device=CPU)
    model = engine.construct(make_model, make_model)
    numel = sum(parameter.numel() for parameter in model.parameters())
    model = engine.prepare(model, make_optimizer(model))
    ids = torch.randint(0, 16, (1, 8), generator=torch.Generator().manual_seed(world.rank))
    for is_step in (True, False):
        with engine.accumulating(last=True):
            with engine.autocast():
                loss = model(input_ids=ids, labels=ids).loss
            engine.backward(loss)
        if is_step:
            engine.step(1.0)
            engine.zero_grad()
    return engine, model, numel


def make_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    """AdamW with the groups that the trainer makes."""
    named = [
        (Parameter(name=name, shape=tuple(p.shape)), p)
        for name, p in model.named_parameters()
        if p.requires_grad
    ]
    groups = [
        {"params": [p for shape, p in named if shape.is_decayed], "weight_decay": 0.1},
        {"params": [p for shape, p in named if not shape.is_decayed], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=1e-3)


def _bytes(tensor: Tensor, counted: set[int]) -> int:
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    storage = local.untyped_storage()
    if storage.nbytes() == 0 or storage.data_ptr() in counted:
        return 0
    counted.add(storage.data_ptr())
    return storage.nbytes()


def _tensors(found: Any) -> list[Tensor]:
    if isinstance(found, Tensor):
        return [found]
    if isinstance(found, dict):
        found = found.values()
    return [tensor for item in found or () for tensor in _tensors(item)]
