"""`python -m bigtrain.checkpoint.consolidate CHECKPOINT OUT`: for the trainer, beside it."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from bigtrain.checkpoint.consolidate import consolidate
from bigtrain.errors import BigtrainError

_NICENESS = 10
"""Training comes first."""


def main(source: str, output: str) -> int:
    """One job, and what the checkpoint says; the exit code."""
    os.nice(_NICENESS)
    try:
        consolidate(Path(source), Path(output), jobs=1)
    except BigtrainError as error:
        print(error, file=sys.stderr)  # noqa: T201 - the trainer reads it
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:3]))
