"""`python -m bigtrain.checkpoint.consolidate CHECKPOINT OUT`: for the trainer, beside it."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from pathlib import Path

from bigtrain.checkpoint.consolidate import consolidate
from bigtrain.checkpoint.consolidate.journal import Staging, partial_of
from bigtrain.errors import BigtrainError, CheckpointError

_NICENESS = 10
"""Training comes first."""


def main(source: str, output: str) -> int:
    """One job, and what the checkpoint says; the exit code."""
    os.nice(_NICENESS)
    _clear_abandoned(Path(output))
    try:
        consolidate(Path(source), Path(output), jobs=1)
    except BigtrainError as error:
        print(error, file=sys.stderr)  # noqa: T201 - the trainer reads it
        return error.exit_code
    return 0


def _clear_abandoned(output: Path) -> None:
    """Remove what killed exports of this run left: `checkpoint-*/model.partial`."""
    for partial in output.parent.parent.glob(f"*/{partial_of(output).name}"):
        with suppress(CheckpointError):  # being written, or not ours
            Staging(partial.with_name(output.name), fingerprint="", resume=False).discard()


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:3]))
