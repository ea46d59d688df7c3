"""What `torch.nn.parallel.DistributedDataParallel` is called with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bigtrain.translate.config import DdpSettings

_KEYS = {
    "ddp_find_unused_parameters": "find_unused_parameters",
    "ddp_bucket_cap_mb": "bucket_cap_mb",
    "ddp_broadcast_buffers": "broadcast_buffers",
    "ddp_static_graph": "static_graph",
}


def settings(values: Mapping[str, Any]) -> DdpSettings:
    """Unused parameters are looked for only when asked: it costs a walk of the graph each step."""
    return DdpSettings(
        find_unused_parameters=bool(values["ddp_find_unused_parameters"]),
        bucket_cap_mb=values["ddp_bucket_cap_mb"],
        broadcast_buffers=values["ddp_broadcast_buffers"],
        static_graph=bool(values["ddp_static_graph"]),
    )


def mapped(config: DdpSettings) -> dict[str, str]:
    """TrainingArguments field → DDP's keyword and value."""
    return {argument: f"{key} = {getattr(config, key)}" for argument, key in _KEYS.items()}
