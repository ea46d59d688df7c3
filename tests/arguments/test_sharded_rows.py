"""The arguments that sharding could change, on two ranks of FSDP: with one process as the oracle.

One pair of ranks trains with many of them at once, and is looked at from many sides.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import EvalPrediction, TrainerCallback

from bigtrain.topology import RankInfo
from tests.arguments.rows import checkpoints, logged, logged_steps
from tests.engine.harness import run_ranks
from tests.trainer.samples import Sentences, tiny_llama
from tests.trainer.samples import trainer as llama_trainer

FIELDS: dict[str, Any] = {
    "per_device_eval_batch_size": 2,
    "gradient_accumulation_steps": 3,
    "learning_rate": 2e-3,
    "weight_decay": 0.3,
    "adam_beta1": 0.8,
    "adam_beta2": 0.95,
    "adam_epsilon": 1e-4,
    "max_grad_norm": 0.5,
    "num_train_epochs": 1.5,
    "lr_scheduler_type": "cosine",
    "warmup_ratio": 0.25,
    "warmup_steps": 0,
    "logging_steps": 1,
    "eval_strategy": "steps",
    "eval_steps": 2,
    "eval_delay": 3,
    "eval_accumulation_steps": 1,
    "save_strategy": "steps",
    "save_steps": 2,
    "save_total_limit": 2,
    "metric_for_best_model": "loss",
    "load_best_model_at_end": True,
    "torch_empty_cache_steps": 2,
    "label_smoothing_factor": 0.1,
    "seed": 3,
    "data_seed": 5,
}


@dataclass(frozen=True, kw_only=True)
class Outcome:
    losses: list[float]
    norms: list[float]
    rates: list[float]
    evaluated: list[int]
    eval_losses: list[float]
    rows: float
    saved: list[int]
    emptied: list[int]
    best: int | None
    after: float


def _rows(found: EvalPrediction) -> dict[str, float]:
    return {"rows": len(found.predictions)}


def _last_logits(logits: Any, labels: Tensor) -> Tensor:
    return (logits[0] if isinstance(logits, tuple) else logits)[:, -1]


def _train(world: RankInfo, folder: str, batch: int, changed: dict[str, Any]) -> Outcome:
    run = llama_trainer(
        folder,
        model=tiny_llama(),
        data=Sentences(44),
        eval_dataset=Sentences(9),
        compute_metrics=_rows,
        per_device_train_batch_size=batch,
        **FIELDS,
        **changed,
    )
    run.preprocess_logits_for_metrics = _last_logits
    emptied: list[int] = []
    torch.accelerator.is_available = lambda: True  # a forked rank's own copy
    torch.accelerator.empty_cache = lambda: emptied.append(run.state.global_step)
    run.train()
    return Outcome(
        losses=logged(run, "loss"),
        norms=logged(run, "grad_norm"),
        rates=logged(run, "learning_rate"),
        evaluated=logged_steps(run, "eval_loss"),
        eval_losses=logged(run, "eval_loss"),
        rows=logged(run, "eval_rows")[-1],
        saved=checkpoints(Path(folder)),
        emptied=sorted(set(emptied)),
        best=run.state.best_global_step,
        after=run.evaluate()["eval_loss"],
    )


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    return run_ranks(1, _train, str(tmp_path_factory.mktemp("alone")), 4, {})[0]


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    folder = str(tmp_path_factory.mktemp("sharded"))
    one, other = run_ranks(2, _train, folder, 2, {"fsdp": "full_shard"})
    assert one == other
    return one


def shows(*rows: str) -> Any:
    def mark(test: Any) -> Any:
        for row in rows:
            test = pytest.mark.shows(row, on="fsdp")(test)
        return test

    return mark


@shows(
    "gradient_accumulation_steps",
    "per_device_train_batch_size",
    "learning_rate",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "max_grad_norm",
    "num_train_epochs",
    "seed",
    "data_seed",
    "model",
    "train_dataset",
    "args",
)
def test_shards_train_as_one_process_does(sharded: Outcome, alone: Outcome) -> None:
    close: dict[str, Any] = {"rtol": 2e-5, "atol": 1e-7}
    torch.testing.assert_close(torch.tensor(sharded.losses), torch.tensor(alone.losses), **close)
    torch.testing.assert_close(torch.tensor(sharded.norms), torch.tensor(alone.norms), **close)


@shows("lr_scheduler_type", "warmup_ratio", "warmup_steps", "lr_scheduler_kwargs")
def test_shards_follow_the_schedule(sharded: Outcome, alone: Outcome) -> None:
    assert sharded.rates == alone.rates and sharded.rates[0] == 0


@shows("eval_strategy", "eval_delay", "eval_accumulation_steps", "per_device_eval_batch_size")
@shows("compute_metrics", "preprocess_logits_for_metrics", "eval_dataset")
def test_shards_evaluate_every_sample_once(sharded: Outcome, alone: Outcome) -> None:
    assert sharded.evaluated == alone.evaluated
    assert sharded.rows == alone.rows == 9
    assert sharded.eval_losses == pytest.approx(alone.eval_losses, rel=0.05)


@shows("save_strategy", "save_steps", "save_total_limit", "output_dir")
def test_shards_save_when_one_process_does(sharded: Outcome, alone: Outcome) -> None:
    assert sharded.saved == alone.saved
    assert sharded.best == alone.best
    assert sharded.after == pytest.approx(min(sharded.eval_losses), rel=1e-5)


@shows("torch_empty_cache_steps")
def test_all_ranks_empty_the_cache_at_the_same_steps(sharded: Outcome, alone: Outcome) -> None:
    assert sharded.emptied == alone.emptied == [0, 2, 4]


class Shouts(TrainerCallback):
    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        logs["seen"] = state.global_step


def _mixed(world: RankInfo, folder: str, changed: dict[str, Any]) -> tuple[Any, ...]:
    run = llama_trainer(
        folder,
        data=Sentences(8),
        eval_dataset=Sentences(3),
        bf16=True,
        prediction_loss_only=True,
        logging_first_step=True,
        logging_strategy="epoch",
        max_steps=2,
        callbacks=[Shouts()],
        **changed,
    )
    run.train()
    predictions = run.predict(Sentences(3)).predictions
    masters = {p.dtype for p in run.model.parameters()}
    return predictions, masters, logged_steps(run), run.state.global_step


@shows("bf16", "prediction_loss_only", "logging_strategy", "logging_first_step", "max_steps")
@shows("callbacks", "logging_steps", "use_cpu")
def test_shards_keep_fp32_masters_and_log_as_told(tmp_path: Path) -> None:
    one, other = run_ranks(2, _mixed, str(tmp_path), {"fsdp": "full_shard"})
    assert one == other == (None, {torch.float32}, [1, 2], 2)
