"""Every parameter has a test that shows it, and that test fails when the parameter is ignored."""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.arguments.rows import ARGUMENT_ROWS, TRAINER_ROWS

ROOT = Path(__file__).parents[2]
MODULES = ("test_argument_rows", "test_trainer_rows", "test_sharded_rows")


@dataclass(frozen=True, kw_only=True)
class Shown:
    """A test that shows a row, on one process or on an engine of several."""

    row: str
    engine: str
    test: str


def shown() -> Iterator[Shown]:
    """What the tests' marks say, in the order of the tests."""
    for name in MODULES:
        module = importlib.import_module(f"tests.arguments.{name}")
        for attribute, value in vars(module).items():
            if attribute.startswith("test_"):
                yield from _of_test(f"tests/arguments/{name}.py::{attribute}", value)


def _of_test(test: str, function: Any) -> Iterator[Shown]:
    for mark in getattr(function, "pytestmark", []):
        if mark.name == "shows":
            engine = mark.kwargs.get("on", "single")
            yield Shown(row=mark.args[0], engine=engine, test=test)
        elif mark.name == "parametrize":
            for case in mark.args[1]:
                for inner in getattr(case, "marks", ()):
                    if inner.name != "shows":
                        continue
                    name = "-".join(next(iter(value)) for value in case.values)
                    yield Shown(row=inner.args[0], engine="single", test=f"{test}[{name}]")


def showing(row: str, engine: str = "single") -> list[str]:
    return [one.test for one in shown() if (one.row, one.engine) == (row, engine)]


def test_every_row_is_shown_and_nothing_else_is() -> None:
    rows = {*TRAINER_ROWS, *ARGUMENT_ROWS}
    assert len(TRAINER_ROWS) == 12 and len(ARGUMENT_ROWS) == 49
    assert {one.row for one in shown() if one.engine == "single"} == rows
    assert {one.row for one in shown()} == rows


@pytest.mark.slow
@pytest.mark.parametrize("row", [*TRAINER_ROWS, *ARGUMENT_ROWS])
def test_a_row_that_is_ignored_fails_the_test_that_shows_it(row: str) -> None:
    plugin = ["-p", "tests.arguments.ignoring", "--ignore-row", row]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *plugin, *showing(row)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    # 1: tests ran and one failed. Anything else is no verdict.
    assert done.returncode == 1, done.stdout + done.stderr
