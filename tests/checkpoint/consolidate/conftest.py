"""Real checkpoints of every kind, written once per session (see writers.py)."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

DEADLINE_S = 300
WRITERS = Path(__file__).with_name("writers.py")


def run_to_end(command: list[str], *, log: Path) -> None:
    """Run it; it and its ranks end with it, or at the deadline."""
    with log.open("w") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code = process.wait(DEADLINE_S)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    assert code == 0, log.read_text()[-4000:]


@pytest.fixture(scope="session")
def written(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """The directory with all kinds of checkpoints by that many ranks; written when asked for."""
    folders: dict[int, Path] = {}

    def write(world: int) -> Path:
        if world not in folders:
            folder = tmp_path_factory.mktemp(f"written-by-{world}")
            command = [sys.executable, str(WRITERS), str(folder), str(world)]
            run_to_end(command, log=folder / "log.txt")
            folders[world] = folder
        return folders[world]

    return write
