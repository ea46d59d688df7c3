"""A plugin that lets one parameter be accepted and ignored: `pytest -p tests.arguments.ignoring
--ignore-row adam_beta1`. The tests that show the parameter must then fail."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import pytest
import transformers

from bigtrain.trainer.arguments import TrainingArguments
from bigtrain.trainer.trainer import Trainer
from tests.arguments.rows import ARGUMENT_ROWS


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--ignore-row", help="The parameter to accept and ignore.")


def pytest_configure(config: pytest.Config) -> None:
    row = config.getoption("--ignore-row")
    if row is not None:
        ignore(str(row))


def ignore(row: str) -> None:
    """From now on in this process, `row` has its default whatever is said."""
    if row in ARGUMENT_ROWS:
        _forget(TrainingArguments, row, default=_default(row))
    else:
        _forget(Trainer, row, default=(None, None) if row == "optimizers" else None)


def _default(row: str) -> Any:
    field = TrainingArguments.__dataclass_fields__[row]
    if field.default is not dataclasses.MISSING:
        return field.default
    return field.default_factory() if callable(field.default_factory) else None


def _forget(owner: type, row: str, *, default: Any) -> None:
    construct = owner.__init__
    order = list(transformers.Trainer.__init__.__annotations__)
    order = order if owner is Trainer else list(TrainingArguments.__dataclass_fields__)

    @functools.wraps(construct)
    def ignoring(self: Any, *values: Any, **named: Any) -> None:
        construct(self, **{**dict(zip(order, values, strict=False)), **named, row: default})

    owner.__init__ = ignoring  # type: ignore[misc]
