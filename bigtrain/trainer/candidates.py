"""What a checkpoint that is to be gone on with is, and which will do."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from bigtrain.checkpoint.foreign import has_been_split
from bigtrain.checkpoint.manifest import MANIFEST
from bigtrain.trainer.saving import SAFETENSORS_FILE, TORCH_FILE


@dataclass(frozen=True, kw_only=True)
class Position:
    """Where in the data training goes on, when another batch size than now was used."""

    epoch: int
    windows: int
    """Optimizer steps of now that hold the samples of the epoch that were seen."""


@dataclass(frozen=True, kw_only=True)
class Search:
    """Which checkpoints will do, where none was asked for by name."""

    since: datetime | None = None
    damaged: Set[Path] = frozenset()
    """Those that turned out to be so when they were read."""

    def without(self, path: Path) -> Search:
        """The same, with one more that is damaged."""
        return Search(since=self.since, damaged=self.damaged | {path})


def is_deepspeed(scheduler: dict[str, Any]) -> bool:
    """Whether it is of one of DeepSpeed's schedulers, which count in their own way."""
    return "last_batch_iteration" in scheduler


def is_ours(directory: Path) -> bool:
    """Whether bigtrain wrote it, and it is as it was."""
    return (directory / MANIFEST).is_file() and not has_been_split(directory)


def is_transformers(directory: Path) -> bool:
    """Whether a model's weights lie there as transformers saves them."""
    names = (
        SAFETENSORS_FILE,
        TORCH_FILE,
        f"{SAFETENSORS_FILE}.index.json",
        f"{TORCH_FILE}.index.json",
        "adapter_model.safetensors",
        "adapter_model.bin",
    )
    return any((directory / name).is_file() for name in names)
