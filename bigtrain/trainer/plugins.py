"""What scripts ask accelerate's plugins for: how the engine shards, in accelerate's words."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from bigtrain.translate.config import DeepSpeedSettings, EngineSettings, FsdpSettings


@dataclass(frozen=True, kw_only=True)
class FsdpPlugin:
    """Of accelerate's `FullyShardedDataParallelPlugin`."""

    reshard_after_forward: bool
    cpu_offload: bool
    fsdp_version: int = 2


@dataclass(frozen=True, kw_only=True)
class DeepSpeedPlugin:
    """Of accelerate's `DeepSpeedPlugin`."""

    zero_stage: int
    deepspeed_config: dict[str, Any]

    @property
    def offload_optimizer_device(self) -> str:
        return self._offload("offload_optimizer")

    @property
    def offload_param_device(self) -> str:
        return self._offload("offload_param")

    def _offload(self, key: str) -> str:
        said: Mapping[str, Any] = self.deepspeed_config.get("zero_optimization", {}).get(key) or {}
        return str(said.get("device", "none"))


def fsdp(settings: EngineSettings) -> FsdpPlugin | None:
    """The plugin, where the engine is FSDP."""
    if not isinstance(settings, FsdpSettings):
        return None
    return FsdpPlugin(
        reshard_after_forward=settings.reshard_after_forward, cpu_offload=settings.cpu_offload
    )


def deepspeed(settings: EngineSettings) -> DeepSpeedPlugin | None:
    """The plugin, where the engine is DeepSpeed; its config a copy, to be changed in vain."""
    if not isinstance(settings, DeepSpeedSettings):
        return None
    return DeepSpeedPlugin(
        zero_stage=settings.zero_stage, deepspeed_config=copy.deepcopy(dict(settings.json))
    )


def resolved_deepspeed(config: Any, args: Any) -> Any:
    """A DeepSpeed JSON (or its path) as transformers resolves it by the arguments.

    transformers would keep it as the process's own and build every model under `zero.Init`
    while it lives: it is taken back at once.
    """
    from transformers.integrations.deepspeed import (
        HfTrainerDeepSpeedConfig,
        unset_hf_deepspeed_config,
    )

    resolved = HfTrainerDeepSpeedConfig(config)
    unset_hf_deepspeed_config()
    resolved.trainer_config_process(args)
    return resolved


def deepspeed_of(resolved: Any) -> DeepSpeedPlugin:
    """The plugin of arguments with a DeepSpeed JSON."""
    return DeepSpeedPlugin(
        zero_stage=resolved.get_value("zero_optimization.stage", 0),
        deepspeed_config=copy.deepcopy(resolved.config),
    )
