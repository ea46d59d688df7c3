"""How a command tells of a fault: in words on stderr, or with `--json` as one line on stdout."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import typer

from bigtrain.errors import BigtrainError, ConfigError
from bigtrain.printable import printable
from bigtrain.secrecy import masked


def error_text(error: BigtrainError) -> str:
    """`error: what`, or a list where there are several faults, each on one line.

    What has no list of faults may have lines of its own.
    """
    if not isinstance(error, ConfigError):
        return "\n".join(map(_shown, f"error: {error}".split("\n")))
    faults = list(map(_shown, error.faults))
    if len(faults) == 1:
        return f"error: {faults[0]}"
    return "\n".join((f"error: {len(faults)} faults", *(f"  {fault}" for fault in faults)))


def _shown(line: str) -> str:
    return masked(printable(line))


@contextmanager
def faults_told(*, as_json: bool) -> Iterator[None]:
    """With `--json` a fault is `{"kind": "failure", "text": …}` on stdout, where everything else is
    then; the exit code is the same."""
    try:
        yield
    except BigtrainError as error:
        if not as_json:
            raise
        from bigtrain.console import open_console

        open_console(as_json=True).fail(error_text(error))
        raise typer.Exit(error.exit_code) from None
