"""The output of rank 0 as it grows, without what no reader can act on."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

_NOISE = re.compile(
    rb"hostname of the client socket cannot be retrieved"
    rb"|^\[Gloo\] Rank \d+ is connected to \d+ peer ranks"
    rb"|^\[?\S* ?\S*\] \[(INFO|WARNING)\] \[real_accelerator\.py"
    rb"|site-packages/(torch|deepspeed)/\S*:\d+: (?P<warning>(Future|User|Deprecation)Warning)"
)
_TRACEBACK = b"Traceback (most recent call last):"
_CHUNK = 65_536


class LogFollower:
    """Passes on to `show` what is appended to a file from now on: whole lines at once, an
    unfinished one a poll later.

    A progress bar is an unfinished line that is rewritten, so it may not be held back for long.
    """

    def __init__(self, path: Path, *, show: Callable[[bytes], None]) -> None:
        path.touch()
        self._file = path.open("rb", buffering=0)
        self._file.seek(0, os.SEEK_END)
        self._show = show
        self._held = b""
        self._in_line = False
        """True when the start of the present line was shown already: the rest belongs to it."""
        self._after_warning = False
        """True when the line before was a warning that was left out: this may be its source."""
        self._ends_at_traceback = False
        self._is_over = False

    def end_at_traceback(self) -> None:
        """A rank has failed or is interrupted: what rank 0 writes is shown up to its own traceback,
        if it comes to one. The failure's message has the cause, from which rank 0's may follow."""
        self._ends_at_traceback = True

    def poll(self) -> None:
        """Show what was written since the last poll."""
        held = self._held
        while chunk := self._file.read(_CHUNK):
            self._take(chunk)
        if self._held and self._held == held:
            self._show_rest()

    def close(self) -> None:
        """Show the rest and let go of the file."""
        self.poll()
        self._show_rest()
        self._file.close()

    def _take(self, chunk: bytes) -> None:
        *lines, self._held = (self._held + chunk).split(b"\n")
        kept = []
        for line in lines:
            self._is_over |= self._ends_at_traceback and _TRACEBACK in line
            if self._is_over:
                break
            if self._in_line or not self._is_noise(line):
                kept.append(line + b"\n")
            self._in_line = False
        if kept:
            self._show(b"".join(kept))
        if self._is_over:
            self._held = b""
        elif len(self._held) > _CHUNK:
            self._show_rest()

    def _is_noise(self, line: bytes) -> bool:
        if self._after_warning and line.startswith(b"  "):
            self._after_warning = False
            return True  # the source line, which Python prints below a warning
        found = _NOISE.search(line)
        self._after_warning = found is not None and found["warning"] is not None
        return found is not None

    def _show_rest(self) -> None:
        if self._held and (self._in_line or not _NOISE.search(self._held)):
            self._show(self._held)
            self._in_line = True
            self._held = b""
