"""The agent's own diary: `agent.log`, one dated line per thing that happened."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path
from typing import TextIO

from bigtrain.log_time import stamp


class AgentLog:
    """Appends lines; each is on its way to the disk when `write` returns.

    A disk that is full ends no run: what can't be written is not.
    """

    def __init__(self, path: Path) -> None:
        self._file: TextIO = path.open("a", encoding="utf-8", buffering=1)

    def write(self, text: str) -> None:
        now = stamp(time.time())
        with contextlib.suppress(OSError):
            for line in text.splitlines():
                self._file.write(f"{now} {line}\n")

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._file.close()
