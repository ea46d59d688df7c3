"""A rank's hold on the process that writes its checkpoints while it goes on training."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path

import bigtrain
from bigtrain.checkpoint import commit
from bigtrain.checkpoint.arena import Arena, layout
from bigtrain.checkpoint.commit import Destination
from bigtrain.checkpoint.snapshot import Snapshot
from bigtrain.checkpoint.writer import IGNORED, Order, Outcome, Outline, Reserve

_CLOSE_S = 5.0


class BackgroundWriter:
    """Starts the process when it is made. One order at a time."""

    def __init__(self) -> None:
        self._arena = Arena()
        ours, theirs = socket.socketpair()
        self._process = _start(theirs.fileno(), self._arena.fd)
        theirs.close()
        self._orders = Connection(ours.detach())
        self._destination: Destination | None = None
        self._rank = 0

    @property
    def is_busy(self) -> bool:
        """Whether an order's outcome has not been asked for yet."""
        return self._destination is not None

    def prepare(self, nbytes: int) -> None:
        """Have memory for so many bytes made ready meanwhile. Does nothing where there is none."""
        self._orders.send(Reserve(nbytes=nbytes))

    def copy(self, snapshot: Snapshot, destination: Destination) -> Order:
        """The order to write this state, copied: training may go on."""
        share = snapshot.share(self._arena.copy)
        sizes = [piece.data.nbytes for piece in share.pieces]
        places = zip(layout(sizes)[0], sizes, strict=True)
        return Order(
            share=replace(share, pieces=()),
            outlines=tuple(map(Outline.of, share.pieces)),
            places=tuple(places),
            arena_bytes=self._arena.size,
            destination=destination,
        )

    def give(self, order: Order) -> None:
        """Have it written."""
        self._destination, self._rank = order.destination, order.share.rank
        try:
            self._orders.send(order)
        except OSError:
            return  # the process has gone, which `outcome` then says

    def outcome(self, *, wait: bool) -> Outcome | None:
        """What became of the order; None while it is being carried out."""
        try:
            if not wait and not self._orders.poll(0):
                return None
            found: Outcome = self._orders.recv()
        except (EOFError, OSError):
            found = Outcome(fault=self._obituary())
            if self._destination is not None:
                message = f"rank {self._rank}: {found.fault}"
                commit.tell_failure(self._destination.staging, self._rank, message)
        self._destination = None
        return found

    @property
    def is_alive(self) -> bool:
        """Whether the process can take an order."""
        return self._process.poll() is None

    def close(self) -> None:
        """Let the process go; it finishes what it was told. Safe to call twice."""
        self._orders.close()
        self._arena.close()
        if self._destination is None:
            try:
                self._process.wait(_CLOSE_S)
            except subprocess.TimeoutExpired:
                return

    def _obituary(self) -> str:
        code = self._process.wait()
        if code < 0:
            name = signal.Signals(-code).name
            often = " (often the kernel's out-of-memory killer)" if name == "SIGKILL" else ""
            return f"the process that writes checkpoints was killed by {name}{often}"
        return f"the process that writes checkpoints ended with exit code {code}"


def _start(orders: int, arena: int) -> subprocess.Popen[bytes]:
    root = str(Path(bigtrain.__file__).parent.parent)
    # As this process finds it, whatever a script has done to `sys.path`. Not the user's own
    # modules, though: nothing else of his is to run here.
    environment = dict(os.environ)
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (root, environment.get("PYTHONPATH"))))
    # Blocked signals stay blocked in the new process, which has no handlers yet.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, IGNORED)
    try:
        return subprocess.Popen(
            [sys.executable, "-m", "bigtrain.checkpoint.writer", str(orders), str(arena)],
            stdin=subprocess.DEVNULL,
            pass_fds=(orders, arena),
            # Out of the rank's group, which is killed as one.
            start_new_session=True,
            env=environment,
        )
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
