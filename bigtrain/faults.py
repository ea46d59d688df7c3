"""How a command tells of a fault: in words on stderr, or with `--json` as one line on stdout."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import typer

from bigtrain.errors import BigtrainError, ConfigError


def error_text(error: BigtrainError) -> str:
    """`error: what`, or a list where there are several faults."""
    faults = error.faults if isinstance(error, ConfigError) else (str(error),)
    if len(faults) == 1:
        return f"error: {faults[0]}"
    return "\n".join((f"error: {len(faults)} faults", *(f"  {fault}" for fault in faults)))


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
