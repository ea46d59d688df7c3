"""Train Hugging Face models on one process or a thousand: same file, same script, same result.

Importing this package imports neither torch nor transformers: names come when they are asked for.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bigtrain.checkpoint.consolidate import consolidate
    from bigtrain.plan import RunPlan, current_plan
    from bigtrain.trainer.arguments import TrainingArguments
    from bigtrain.trainer.seq2seq import Seq2SeqTrainer, Seq2SeqTrainingArguments
    from bigtrain.trainer.trainer import Trainer

__version__ = "0.1.0"
__all__ = [
    "RunPlan",
    "Seq2SeqTrainer",
    "Seq2SeqTrainingArguments",
    "Trainer",
    "TrainingArguments",
    "__version__",
    "consolidate",
    "current_plan",
]

_HOMES = {
    "RunPlan": "bigtrain.plan",
    "Seq2SeqTrainer": "bigtrain.trainer.seq2seq",
    "Seq2SeqTrainingArguments": "bigtrain.trainer.seq2seq",
    "Trainer": "bigtrain.trainer.trainer",
    "TrainingArguments": "bigtrain.trainer.arguments",
    "consolidate": "bigtrain.checkpoint.consolidate",
    "current_plan": "bigtrain.plan",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
