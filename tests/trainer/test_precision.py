"""What metrics see of a model that computes in bf16 or fp16."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor

from bigtrain.topology import RankInfo
from bigtrain.trainer.arguments import TrainingArguments
from bigtrain.trainer.trainer import Trainer
from tests.engine.harness import run_ranks
from tests.trainer.samples import Sentences, arguments, tiny_llama

BOTH = (
    (transformers.Trainer, transformers.TrainingArguments),
    (Trainer, TrainingArguments),
)


def _predicted(
    folder: Path | str, kind: tuple[Any, Any], **changed: Any
) -> tuple[list[torch.dtype], Any]:
    seen: list[torch.dtype] = []

    def keep(logits: Tensor, labels: Tensor) -> Tensor:
        seen.append(logits.dtype)
        return torch.from_numpy(logits.numpy())  # which bf16 has none of

    trainer_class, arguments_class = kind
    args = arguments(folder, kind=arguments_class, use_cpu=True, **changed)
    run = trainer_class(model=tiny_llama(), args=args, preprocess_logits_for_metrics=keep)
    return seen, run.predict(Sentences(6)).predictions


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_metrics_see_fp32_as_with_transformers(tmp_path: Path, precision: str) -> None:
    (their_dtypes, theirs), (our_dtypes, ours) = (
        _predicted(tmp_path, kind, **{precision: True}) for kind in BOTH
    )
    assert our_dtypes == their_dtypes == [torch.float32] * len(our_dtypes)
    assert ours.dtype == theirs.dtype == np.float32
    np.testing.assert_allclose(ours, theirs, atol=1e-3)


def _on_shards(world: RankInfo, folder: str) -> list[torch.dtype]:
    return _predicted(folder, BOTH[1], bf16=True, fsdp="full_shard")[0]


def test_metrics_see_fp32_on_shards_too(tmp_path: Path) -> None:
    for seen in run_ranks(2, _on_shards, str(tmp_path)):
        assert seen and set(seen) == {torch.float32}
