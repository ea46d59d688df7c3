"""One process trains alone: the reference that every other engine is compared with."""

from __future__ import annotations

import torch

from bigtrain.engine.torch_engine import TorchEngine
from bigtrain.errors import ConfigError
from bigtrain.topology import RankInfo
from bigtrain.translate.config import EngineConfig


class SingleEngine(TorchEngine):
    """The whole model in one process; refuses to be one of several."""

    def __init__(self, config: EngineConfig, *, world: RankInfo, device: torch.device) -> None:
        if world.world_size > 1:
            raise ConfigError(
                f"engine single trains in one process, but there are {world.world_size} "
                f"({world.source}); use engine ddp or fsdp"
            )
        super().__init__(config, world=world, device=device)
