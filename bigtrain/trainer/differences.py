"""Which arguments differ from those that a checkpoint was saved with, and which count."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import Any

from bigtrain.checkpoint.inert import Inert
from bigtrain.checkpoint.torch_file import Archive
from bigtrain.errors import CheckpointError
from bigtrain.trainer.arguments import TrainingArguments

logger = logging.getLogger(__name__)

# The optimizer's groups come back with the values that it was saved with.
_SAVED_COUNT = ("learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon")
# Where things go, how they are shown, and what is for the script: nobody takes these for a mistake.
_UNTOLD = (
    "output_dir",
    "overwrite_output_dir",
    "logging_dir",
    "run_name",
    "report_to",
    "resume_from_checkpoint",
    "disable_tqdm",
    "log_level",
    "log_level_replica",
    "do_train",
    "do_eval",
    "do_predict",
    "local_rank",
    "hub_token",
)


def tell(saved: Path, args: TrainingArguments) -> None:
    """Warn of what differs. `saved`: a `training_args.bin`; nothing in it is run."""
    if not saved.is_file():
        return
    try:
        lines = list(_differences(_values(Archive(saved).read()), args))
    except CheckpointError as fault:
        logger.info("the checkpoint's arguments are not compared: %s", fault)
        return
    if lines:
        logger.warning("arguments differ from the checkpoint's:\n  %s", "\n  ".join(lines))


def _differences(before: dict[str, Any], args: TrainingArguments) -> Iterator[str]:
    for field in dataclasses.fields(args):
        now = _plain(getattr(args, field.name, None))
        if field.name in _UNTOLD or field.name not in before or not _is_plain(now):
            continue
        was = _plain(before[field.name])
        if _is_plain(was) and was != now:
            kept = field.name in _SAVED_COUNT and not args.reset_optimizer
            counts = "the checkpoint's counts" if kept else "the new one counts"
            yield f"{field.name}: {now!r} now, {was!r} in the checkpoint: {counts}"


def _values(read: Any) -> dict[str, Any]:
    state = read.state if isinstance(read, Inert) else None
    return state if isinstance(state, dict) else {}


def _plain(value: Any) -> Any:
    """An enum's value, live or as the pickle has it."""
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, Inert) and len(value.args) == 1 and isinstance(value.args[0], str):
        return value.args[0]
    return value


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, (bool, int, float, str))
