"""Signals as things to read, so that the agent has one place where it waits."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from types import FrameType, TracebackType
from typing import Any

EXIT_AGAIN = 85
"""Left after SIGUSR1 or SIGUSR2, or the loss of a node: run me again, from what was saved last."""
FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)
"""Passed on to every rank. One that this process was started to ignore (nohup) stays ignored."""


class SignalInbox:
    """While it is open, signals are kept here instead of acting on this process.

    `fileno()` is readable when a signal has come. Must be opened in the main thread.
    """

    def __init__(self) -> None:
        self._before: dict[int, Any] = {}

    def __enter__(self) -> SignalInbox:
        self._output, self._input = os.pipe()
        for end in (self._output, self._input):
            os.set_blocking(end, False)
        self._wakeup_before = signal.set_wakeup_fd(self._input, warn_on_full_buffer=False)
        for number in (*FORWARDED, signal.SIGCHLD):
            if number == signal.SIGCHLD or signal.getsignal(number) != signal.SIG_IGN:
                self._before[number] = signal.signal(number, _noticed)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup_before)
        os.close(self._output)
        os.close(self._input)

    def fileno(self) -> int:
        return self._output

    def drain(self) -> Sequence[int]:
        """The signals to pass on that came since the last call, in order."""
        try:
            numbers = os.read(self._output, 4096)
        except BlockingIOError:
            return ()
        return tuple(n for n in numbers if n != signal.SIGCHLD)


def _noticed(number: int, frame: FrameType | None) -> None:
    """Python writes the number to the wake-up pipe; nothing else is to be done."""
