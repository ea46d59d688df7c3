"""What the ranks refuse when they make arguments, optimizer and schedule is refused in a plan."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from bigtrain.arguments.reporters import reporters
from bigtrain.arguments.schema import defaults, load_schema
from bigtrain.translate import consistency

_STEPS = {"eval_strategy": "steps", "save_strategy": "steps"}
WRONG: list[tuple[str, dict[str, Any]]] = [
    ("logging_steps", {"logging_steps": 0}),
    ("logging_steps", {"logging_steps": 2.5}),
    ("eval_steps", {"eval_strategy": "steps", "eval_steps": 1.5}),
    ("save_steps", {"save_steps": 10.5}),
    ("warmup_steps", {"warmup_steps": -3}),
    ("dataloader_prefetch_factor", {"dataloader_prefetch_factor": 2}),
    ("torch_empty_cache_steps", {"torch_empty_cache_steps": 0}),
    ("lr_scheduler_type", {"lr_scheduler_type": "reduce_lr_on_plateau"}),
    ("load_best_model_at_end", {"load_best_model_at_end": True}),
    (
        "load_best_model_at_end",
        {"load_best_model_at_end": True, **_STEPS, "eval_steps": 7, "save_steps": 5},
    ),
    (
        "load_best_model_at_end",
        {"load_best_model_at_end": True, **_STEPS, "eval_steps": 0.1, "save_steps": 5},
    ),
]
RIGHT: list[dict[str, Any]] = [
    {},
    {"logging_steps": 0.1},
    {"eval_strategy": "steps", "logging_steps": 3},
    {"logging_strategy": "no", "logging_steps": 0},
    {"dataloader_num_workers": 1, "dataloader_prefetch_factor": 2},
    {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "epoch"},
    {"load_best_model_at_end": True, "eval_strategy": "epoch", "save_strategy": "epoch"},
    {"load_best_model_at_end": True, "eval_strategy": "epoch", "save_strategy": "best"},
    {"load_best_model_at_end": True, **_STEPS, "eval_steps": 5, "save_steps": 15},
    {"load_best_model_at_end": True, **_STEPS, "eval_steps": 0.1, "save_steps": 0.3},
]


@pytest.mark.parametrize(("argument", "values"), WRONG)
def test_what_transformers_refuses_is_refused_by_name(
    argument: str, values: dict[str, Any], tmp_path: Any
) -> None:
    from transformers import TrainingArguments

    found = consistency.faults(defaults(load_schema()) | values)
    assert [name for name, _ in found] == [argument]
    with pytest.raises(ValueError):
        TrainingArguments(output_dir=str(tmp_path), use_cpu=True, **values)


@pytest.mark.parametrize(
    ("argument", "values"),
    [
        ("seed", {"seed": -1}),
        ("seed", {"seed": 2**32}),
        ("learning_rate", {"learning_rate": -1.0}),
        ("learning_rate", {"learning_rate": -1.0, "optim": "sgd"}),
        ("adam_beta1", {"adam_beta1": 1.5}),
        ("adam_beta2", {"adam_beta2": 1}),
        ("adam_epsilon", {"adam_epsilon": -1e-8}),
        ("neftune_noise_alpha", {"neftune_noise_alpha": -1.0}),
        ("debug", {"debug": "foo"}),
        ("lr_scheduler_kwargs", {"lr_scheduler_kwargs": {"num_cycles": 2}}),
        ("lr_scheduler_kwargs", {"lr_scheduler_kwargs": {"num_warmup_steps": 2}}),
        (None, {"learning_rate": -1.0, "optim": "adafactor"}),
        (None, {"adam_beta1": 1.5, "optim": "sgd"}),
        (None, {"data_seed": -1, "debug": "underflow_overflow"}),
        (None, {"lr_scheduler_type": "cosine", "lr_scheduler_kwargs": {"num_cycles": 2}}),
        (None, {"lr_scheduler_type": "constant", "lr_scheduler_kwargs": {"num_cycles": 2}}),
    ],
)
def test_what_transformers_refuses_to_train_with_is_refused_and_nothing_else(
    argument: str | None, values: dict[str, Any], tmp_path: Path
) -> None:
    found = consistency.faults(defaults(load_schema()) | values)

    assert [name for name, _ in found] == ([argument] if argument else [])
    with pytest.raises((ValueError, TypeError, RuntimeError)) if argument else nullcontext():
        _train(tmp_path, values)


def _train(output_dir: Path, values: dict[str, Any]) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

    size = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1, "vocab_size": 8}
    model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, **size))
    row = {"input_ids": torch.arange(4), "labels": torch.arange(4)}
    plain = {"use_cpu": True, "report_to": "none", "save_strategy": "no", "max_steps": 1}
    args = TrainingArguments(output_dir=str(output_dir), **plain, **values)
    Trainer(model=model, args=args, train_dataset=[row] * 8).train()


def test_a_share_of_warmup_is_one() -> None:
    found = consistency.faults(defaults(load_schema()) | {"warmup_ratio": 2.0})

    assert list(found) == [("warmup_ratio", "2 is no share of all steps; give 0 to 1")]


@pytest.mark.parametrize("values", RIGHT)
def test_what_transformers_takes_is_taken(values: dict[str, Any], tmp_path: Any) -> None:
    from transformers import TrainingArguments

    assert list(consistency.faults(defaults(load_schema()) | values)) == []
    TrainingArguments(output_dir=str(tmp_path), use_cpu=True, **values)


def test_a_reporter_that_transformers_does_not_have_is_refused() -> None:
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    values = defaults(load_schema())

    assert reporters() == tuple(INTEGRATION_TO_CALLBACK)
    assert list(consistency.faults(values | {"report_to": ["tensorboard", "wandbb"]})) == [
        ("report_to", "wandbb is not supported; did you mean 'wandb'?")
    ]
    for said in (None, "none", "all", [], ["wandb", "mlflow"]):
        assert list(consistency.faults(values | {"report_to": said})) == []
