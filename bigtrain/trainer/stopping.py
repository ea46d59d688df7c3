"""Stopping when the cluster asks: a signal becomes a flag, and all ranks leave at the same step.

A signal reaches ranks at different moments. Each rank only notes it; the note travels with the
all-reduce that every accumulation window makes anyway, and is read one window later, so that no
rank waits for it. Then all save together and leave with an exit code that tells the cluster why.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import torch
import torch.distributed as dist
from torch import Tensor

from bigtrain.trainer import collectives

EXIT_TERMINATED = 143
"""Left on SIGTERM, as a shell reports it."""
EXIT_REQUEUE = 85
"""Left on SIGUSR1 or SIGUSR2, the early notice that schedulers give: run me again."""

# Weight of a signal in the flag that ranks sum. Above any number of ranks, so that the sum tells
# whether any rank was told to end for good.
_NOTICED, _TERMINATED = 1, 1 << 20


class StopRequestedError(Exception):
    """All ranks have agreed to stop. The loop saves, then leaves with `exit_code`."""

    def __init__(self, exit_code: int) -> None:
        super().__init__(f"stopping with exit code {exit_code}")
        self.exit_code = exit_code


class StopFlag:
    """This rank's note of a signal, and what all ranks have agreed on so far.

    Armed only under a launcher that sends signals; else it costs nothing and stops nothing.
    """

    def __init__(self, *, device: torch.device, is_armed: bool) -> None:
        self.is_armed = is_armed
        self._device = device
        self._noted = 0
        self._save_status = 0
        self._save_is_known = False
        self._pending: Tensor | None = None
        self._copied: torch.cuda.Event | None = None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Inside, TERM, USR1 and USR2 are noted instead of ending the process."""
        # Python allows handlers in the main thread only.
        if not self.is_armed or threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {
            number: signal.signal(number, self._note)
            for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
        }
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        """The end for good outranks a notice, whichever came first."""
        told = _TERMINATED if number == signal.SIGTERM else _NOTICED
        self._noted = max(self._noted, told)

    def exchange(self, items: Tensor | None) -> Tensor | None:
        """The sum of `items` (0-dim) over all ranks, with this rank's notes; all ranks call it."""
        if collectives.world_size() == 1:
            return items
        # Filled, not made from a list: that would wait for the device.
        message = torch.full((3,), self._noted, dtype=torch.int64, device=self._device)
        message[2].fill_(self._save_status)
        self._save_is_known = True
        if items is None:
            message[0].zero_()
        else:
            message[0].copy_(items)
        dist.all_reduce(message)
        self._keep(message)
        return None if items is None else message[0]

    def _keep(self, message: Tensor) -> None:
        if message.device.type == "cpu":
            self._pending = message
            return
        self._pending = torch.empty(3, dtype=torch.int64, pin_memory=True)
        self._pending.copy_(message, non_blocking=True)
        self._copied = torch.cuda.Event()
        self._copied.record()

    def check(self) -> None:
        """Raises StopRequestedError when the last exchange but none later carried a note.

        Call it before the next exchange: by then the last one's answer has long arrived.
        """
        agreed = self._noted if collectives.world_size() == 1 else self._answer()
        if agreed:
            raise StopRequestedError(EXIT_TERMINATED if agreed >= _TERMINATED else EXIT_REQUEUE)

    def note_save(self, status: int) -> None:
        """What this rank knows of the save in flight, for the next exchange."""
        self._save_status = status

    def forget_save(self) -> None:
        """Another save begins: what was exchanged until now is of an earlier one."""
        self._save_status, self._save_is_known = 0, False

    def save_status(self) -> int:
        """The sum over all ranks of what the last exchange carried of the save in flight."""
        if collectives.world_size() == 1:
            return self._save_status
        return self._answer(2) if self._save_is_known else 0

    def _answer(self, place: int = 1) -> int:
        if self._pending is None:
            return 0
        if self._copied is not None:
            self._copied.synchronize()
        return int(self._pending.numpy()[place])
