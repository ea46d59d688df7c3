"""What a checkpoint that is to be gone on with is, and which will do."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from transformers import TrainerState

from bigtrain.checkpoint.foreign import has_been_split
from bigtrain.checkpoint.manifest import MANIFEST
from bigtrain.errors import CheckpointError
from bigtrain.trainer.models import SAFETENSORS_FILE, TORCH_FILE


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


def trainer_state(path: Path) -> TrainerState:
    """The trainer's state, which people edit: CheckpointError where it no longer is one."""
    try:
        state: TrainerState = TrainerState.load_from_json(str(path))
    except (ValueError, TypeError) as fault:
        raise CheckpointError(
            f"{path} is no trainer's state ({fault}); mend it, or go on from another checkpoint"
        ) from fault
    return state
