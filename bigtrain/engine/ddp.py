"""Every rank holds the whole model; gradients are averaged while the backward pass runs."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from bigtrain.engine import process_group, rank_zero
from bigtrain.engine.torch_engine import TorchEngine
from bigtrain.errors import ConfigError
from bigtrain.topology import RankInfo
from bigtrain.translate.config import DdpSettings, EngineConfig


class DdpEngine(TorchEngine):
    """torch's DistributedDataParallel."""

    def __init__(self, config: EngineConfig, *, world: RankInfo, device: torch.device) -> None:
        super().__init__(config, world=world, device=device)
        if not isinstance(config.settings, DdpSettings):
            raise ConfigError(f"engine ddp got {type(config.settings).__name__}")
        self._settings = config.settings
        process_group.join(world, device=device)
        self._wrapped: DistributedDataParallel | None = None

    def prepare(self, model: nn.Module, optimizer: Optimizer | None) -> nn.Module:
        if self._wrapped is not None and self._wrapped.module is model:
            # Its hooks are on the parameters already; a second wrapper would average twice.
            self._hold(model, optimizer)
            return self._wrapped
        model = super().prepare(model, optimizer)
        if optimizer is None or not any(p.requires_grad for p in model.parameters()):
            rank_zero.check_same(model)
            rank_zero.Spreader(self.device).fill(model)
            return model
        self._wrapped = DistributedDataParallel(
            model,
            device_ids=[self.device] if self.device.type == "cuda" else None,
            **self._keywords(),
        )
        return self._wrapped

    def accumulating(self, *, last: bool) -> AbstractContextManager[None]:
        if last or self._wrapped is None:
            return nullcontext()
        return self._wrapped.no_sync()

    def close(self) -> None:
        super().close()
        self._wrapped = None

    def _keywords(self) -> dict[str, Any]:
        settings = self._settings
        keywords: dict[str, Any] = {
            "find_unused_parameters": settings.find_unused_parameters,
            "static_graph": settings.static_graph,
        }
        # None leaves the choice to torch.
        if settings.bucket_cap_mb is not None:
            keywords["bucket_cap_mb"] = settings.bucket_cap_mb
        if settings.broadcast_buffers is not None:
            keywords["broadcast_buffers"] = settings.broadcast_buffers
        return keywords
