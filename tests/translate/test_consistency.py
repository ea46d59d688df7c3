"""What transformers refuses when it makes the arguments is refused in a plan already."""

from __future__ import annotations

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
