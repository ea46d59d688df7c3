"""The one factory of engines: each engine's module is imported only when it is the one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bigtrain.errors import ConfigError
from bigtrain.topology import RankInfo
from bigtrain.translate.config import ENGINE_NAMES, EngineConfig

if TYPE_CHECKING:
    import torch

    from bigtrain.engine.protocol import Engine


def build_engine(config: EngineConfig, *, world: RankInfo, device: torch.device) -> Engine:
    """The engine that `config` names, for this rank on this device. All ranks must call it.

    An engine that spans ranks joins the process group if nobody has; `process_group.join` says how
    ranks find each other, and when they leave. Closing an engine does not: another may follow.
    """
    if config.name == "single":
        from bigtrain.engine.single import SingleEngine

        return SingleEngine(config, world=world, device=device)
    if config.name == "ddp":
        from bigtrain.engine.ddp import DdpEngine

        return DdpEngine(config, world=world, device=device)
    if config.name == "fsdp":
        from bigtrain.engine.fsdp import FsdpEngine

        return FsdpEngine(config, world=world, device=device)
    if config.name in ("zero1", "zero2", "zero3"):
        from bigtrain.engine.deepspeed import DeepSpeedEngine

        return DeepSpeedEngine(config, world=world, device=device)
    raise ConfigError(f"engine {config.name!r} is unknown; use {', '.join(ENGINE_NAMES)}")
