"""Values are read as their field declares them, and refused in words otherwise."""

from __future__ import annotations

from typing import Any

import pytest

from bigtrain.arguments.schema import load_schema
from bigtrain.arguments.values import did_you_mean, read_value

_TOO_LARGE = "too large a number: none may have 64 bits or more"


@pytest.mark.parametrize(
    ("name", "given", "read"),
    [
        ("learning_rate", "1e-4", 1e-4),
        ("learning_rate", 1, 1),
        ("warmup_steps", 100, 100),
        ("warmup_steps", 0.1, 0.1),
        ("max_steps", 1e3, 1000),
        ("max_steps", "20", 20),
        ("bf16", True, True),
        ("bf16", "yes", True),
        ("bf16", "off", False),
        ("eval_steps", None, None),
        ("save_strategy", "no", "no"),
        ("eval_strategy", "epochs", "epoch"),
        ("report_to", ["tensorboard"], ["tensorboard"]),
        ("report_to", "tensorboard", "tensorboard"),
        ("lr_scheduler_kwargs", {"num_cycles": 2}, {"num_cycles": 2}),
        ("include_num_input_tokens_seen", True, True),
        ("include_num_input_tokens_seen", "no", "no"),
    ],
)
def test_a_value_is_read_as_its_field_declares(name: str, given: Any, read: Any) -> None:
    value = read_value(load_schema()[name], given)

    assert value == read
    assert type(value) is type(read)


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("max_steps", 20.5, "20.5 is not a whole number"),
        ("max_steps", True, "true is not a whole number"),
        ("max_steps", "many", "'many' is not a whole number"),
        ("max_steps", None, "has no value; give a whole number, or leave it out"),
        ("learning_rate", float("inf"), "inf is not a number"),
        ("learning_rate", "nan", "nan is not a number"),
        ("bf16", 1, "1 is not true or false"),
        ("per_device_train_batch_size", 1e308, _TOO_LARGE),
        (
            "per_device_train_batch_size",
            10**400,
            _TOO_LARGE,
        ),
        ("max_steps", "9" * 400, _TOO_LARGE),
        ("per_device_train_batch_size", 0, "0 is too small; it must be at least 1"),
        ("output_dir", 5, "5 is not text"),
        ("label_names", "labels", "'labels' is not a list"),
        ("max_steps", [1], "[1] is not a whole number"),
        (
            "save_strategy",
            "step",
            "'step' is not one of no, steps, epoch, best; did you mean 'steps'?",
        ),
        (
            "parallelism_config",
            "x",
            "'x' is not something that a run file can say; leave it out",
        ),
    ],
)
def test_a_wrong_value_is_refused_with_what_it_should_be(
    name: str, given: Any, message: str
) -> None:
    with pytest.raises(ValueError) as raised:
        read_value(load_schema()[name], given)

    assert str(raised.value) == message


def test_nothing_is_suggested_where_nothing_is_close() -> None:
    assert did_you_mean("xyzzy", ["learning_rate"]) == ""
