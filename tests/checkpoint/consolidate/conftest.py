"""Real checkpoints of every kind, written once per session (see writers.py)."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

WRITERS = Path(__file__).with_name("writers.py")


@pytest.fixture(scope="session")
def written(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """The directory with all kinds of checkpoints by that many ranks; written when asked for."""
    folders: dict[int, Path] = {}

    def write(world: int) -> Path:
        if world not in folders:
            folder = tmp_path_factory.mktemp(f"written-by-{world}")
            command = [sys.executable, str(WRITERS), str(folder), str(world)]
            done = subprocess.run(command, capture_output=True, text=True, timeout=300)
            assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
            folders[world] = folder
        return folders[world]

    return write
