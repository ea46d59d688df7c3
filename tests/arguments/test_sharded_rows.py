"""The arguments that sharding could change, on two ranks of FSDP (slowly: of DDP and ZeRO as well):
with one process as the oracle.

One pair of ranks trains with many of them at once, and is looked at from many sides.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import EvalPrediction, TrainerCallback, default_data_collator

from bigtrain.errors import CheckpointError
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


ENGINES: dict[str, dict[str, Any]] = {
    "fsdp": {"fsdp": "full_shard"},
    "ddp": {},
    "zero1": {"deepspeed": {"zero_optimization": {"stage": 1}}},
    "zero2": {"deepspeed": {"zero_optimization": {"stage": 2}}},
    "zero3": {"deepspeed": {"zero_optimization": {"stage": 3}}},
}
EVERY_ENGINE = [
    pytest.param(name, marks=[] if name == "fsdp" else pytest.mark.slow) for name in ENGINES
]


@pytest.fixture(scope="module", params=EVERY_ENGINE)
def sharded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    folder = str(tmp_path_factory.mktemp("sharded"))
    one, other = run_ranks(2, _train, folder, 2, ENGINES[request.param])
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
@pytest.mark.parametrize("engine", ["fsdp", pytest.param("ddp", marks=pytest.mark.slow)])
def test_shards_keep_fp32_masters_and_log_as_told(tmp_path: Path, engine: str) -> None:
    one, other = run_ranks(2, _mixed, str(tmp_path), ENGINES[engine])
    assert one == other == (None, {torch.float32}, [1, 2], 2)


# ---- What is given as objects, and what is saved ----


def _own_loss(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    logits = outputs.logits[:, :-1].flatten(0, 1).float()
    total = torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum")
    return total / num_items_in_batch


def _fresh() -> Any:
    return tiny_llama()


def _given(world: RankInfo, folder: str, batch: int, changed: dict[str, Any]) -> tuple[Any, ...]:
    """Losses with a loss function and collator of one's own; rates and losses with an optimizer of
    one's own; and what going on from a model alone says."""
    sizes: list[int] = []

    def collate(rows: list[Any]) -> Any:
        sizes.append(len(rows))
        return default_data_collator(rows)

    fields: dict[str, Any] = {"per_device_train_batch_size": batch, "max_steps": 3, **changed}
    own = llama_trainer(
        folder, compute_loss_func=_own_loss, data_collator=collate, model_init=_fresh, **fields
    )
    own.train()
    model = tiny_llama()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
    given = llama_trainer(
        folder,
        model=model,
        optimizers=(optimizer, schedule),
        save_strategy="steps",
        save_steps=2,
        save_only_model=True,
        **fields,
    )
    given.train()
    with pytest.raises(CheckpointError, match="save_only_model") as refused:
        llama_trainer(folder, **fields).train(resume_from_checkpoint=f"{folder}/checkpoint-2")
    found = (logged(own, "loss"), logged(given, "loss"), logged(given, "learning_rate"))
    return *found, set(sizes), type(refused.value).__name__


@shows("compute_loss_func", "data_collator", "model_init", "optimizers", "save_only_model")
@pytest.mark.parametrize("engine", EVERY_ENGINE)
def test_shards_take_what_is_given_as_one_process_does(tmp_path: Path, engine: str) -> None:
    alone = run_ranks(1, _given, str(tmp_path / "alone"), 4, {})[0]
    one, other = run_ranks(2, _given, str(tmp_path / "both"), 2, ENGINES[engine])
    assert one[:3] == other[:3]
    for ours, expected in zip(one[:2], alone[:2], strict=True):
        assert ours == pytest.approx(expected, rel=2e-5)
    assert one[2] == alone[2] == [0.3, 0.15, 0.075]
    assert one[3] == {2} and one[4] == alone[4]


def _half(world: RankInfo, folder: str, changed: dict[str, Any]) -> tuple[Any, ...]:
    fields: dict[str, Any] = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, **changed}
    first = llama_trainer(folder, fp16=True, **fields)
    first.train()
    again = llama_trainer(
        folder, fp16=True, **{**fields, "max_steps": 6, "overwrite_output_dir": True}
    )
    again.train()
    masters = {p.dtype for p in first.model.parameters()}
    return logged(first, "loss"), masters, logged_steps(again)


@shows("fp16", "overwrite_output_dir")
@pytest.mark.parametrize("engine", ["fsdp", pytest.param("ddp", marks=pytest.mark.slow)])
def test_shards_compute_in_fp16_and_go_on_in_a_directory_in_use(
    tmp_path: Path, engine: str
) -> None:
    full = run_ranks(2, _half, str(tmp_path / "fp32"), {**ENGINES[engine], "fp16_opt_level": "O0"})
    half = run_ranks(2, _half, str(tmp_path / "fp16"), ENGINES[engine])
    assert half[0] == half[1] and half[0][1] == {torch.float32}
    assert half[0][0] != full[0][0] and half[0][0] == pytest.approx(full[0][0], rel=1e-2)
    assert half[0][2] == [1, 2, 3, 4, 5, 6]


def _gathered(world: RankInfo, folder: str, level: str, engine: str) -> tuple[Any, ...]:
    """The losses, the precision of a layer's weights while it computes, and as they are kept."""
    run = llama_trainer(
        folder,
        fp16=True,
        fp16_opt_level=level,
        max_steps=4,
        data=Sentences(16),
        save_strategy="steps",
        save_steps=2,
        **ENGINES[engine],
    )
    seen: set[torch.dtype] = set()
    norm = run.model.model.layers[0].input_layernorm
    norm.register_forward_hook(lambda module, *_: seen.add(module.weight.dtype))
    run.train()
    again = llama_trainer(
        folder, fp16=True, fp16_opt_level=level, max_steps=4, data=Sentences(16), **ENGINES[engine]
    )
    again.train(resume_from_checkpoint=f"{folder}/checkpoint-2")
    kept = {p.dtype for p in run.model.parameters()}
    return logged(run, "loss"), logged(again, "loss"), seen, kept


@shows("fp16_opt_level")
@pytest.mark.parametrize("engine", ["fsdp", "ddp"])
def test_fp16_levels_on_several_ranks_say_what_is_computed_and_kept_in_fp16(
    tmp_path: Path, engine: str
) -> None:
    by_level = {
        level: run_ranks(2, _gathered, str(tmp_path / level), level, engine)
        for level in ("O0", "O2", "O3")
    }
    fp32, fp16 = {torch.float32}, {torch.float16}
    expected = {"O0": (fp32, fp32), "O2": (fp16, fp32), "O3": (fp16, fp16)}
    for level, (one, other) in by_level.items():
        assert one == other
        losses, resumed, seen, kept = one
        assert (seen, kept) == expected[level]
        assert resumed == losses
        # Without masters, and with an epsilon that fp16 holds, steps are a little other ones.
        assert losses == pytest.approx(by_level["O0"][0][0], rel=5e-2 if level == "O3" else 1e-2)


def _items(world: RankInfo, folder: str, fields: dict[str, Any]) -> int:
    """What the model is told of a window's items."""
    run = llama_trainer(
        folder, max_steps=1, data=Sentences(64), per_device_train_batch_size=32, **fields
    )
    told: list[int] = []
    loss_of = run.model.loss_function

    def note(*args: Any, num_items_in_batch: Any, **kwargs: Any) -> Tensor:
        told.append(int(num_items_in_batch))
        loss: Tensor = loss_of(*args, num_items_in_batch=num_items_in_batch, **kwargs)
        return loss

    run.model.loss_function = note
    run.train()
    return told[-1]


@pytest.mark.parametrize("engine", ["fsdp", pytest.param("zero2", marks=pytest.mark.slow)])
def test_the_count_of_items_is_not_rounded_to_the_compute_precision(
    tmp_path: Path, engine: str
) -> None:
    counts = run_ranks(2, _items, str(tmp_path), {"bf16": True, **ENGINES[engine]})
    labels = [sample["labels"][1:] for sample in Sentences(64)]
    expected = sum(int(row.ne(-100).sum()) for row in labels)
    assert int(torch.tensor(float(expected)).bfloat16()) != expected
    assert counts == [expected, expected]
