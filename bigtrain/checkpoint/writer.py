"""The process beside a rank that writes its checkpoints: hashes, syncs, commits. No torch.

    python -m bigtrain.checkpoint.writer SOCKET ARENA

It gets orders from its rank through SOCKET and finds the tensors' bytes in ARENA, the rank's
memory. An order that has arrived is carried out whatever becomes of the rank: signals that end
ranks are ignored, and when the rank has gone the process finishes and leaves.
"""

from __future__ import annotations

import mmap
import os
import signal
import sys
import time
import traceback
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path

from bigtrain.checkpoint import commit, staging
from bigtrain.checkpoint.commit import Destination
from bigtrain.checkpoint.dtypes import dtype_named
from bigtrain.checkpoint.pieces import Piece, Share
from bigtrain.errors import CheckpointError

_ORPHAN_S = 60.0
"""How long other ranks' shares are waited for when the own rank has gone and nothing grows."""
_NICENESS = 5
IGNORED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
"""Signals that end or stop a rank, and not what it has begun to save."""


@dataclass(frozen=True, kw_only=True)
class Reserve:
    """Take memory before it is needed: the kernel clears it, which takes its time."""

    nbytes: int


@dataclass(frozen=True, kw_only=True)
class Outline:
    """A piece without its bytes."""

    name: str
    kind: str
    dtype: str
    shape: tuple[int, ...]
    start: int

    @classmethod
    def of(cls, piece: Piece) -> Outline:
        """The piece's."""
        return cls(
            name=piece.name,
            kind=piece.kind,
            dtype=piece.dtype.name,
            shape=piece.shape,
            start=piece.start,
        )

    def filled(self, data: memoryview) -> Piece:
        """The piece whose bytes are `data`."""
        return Piece(
            name=self.name,
            kind=self.kind,
            dtype=dtype_named(self.dtype),
            shape=self.shape,
            start=self.start,
            data=data,
        )


@dataclass(frozen=True, kw_only=True)
class Order:
    """Write this share, and on rank 0 commit the whole."""

    share: Share
    """Without its pieces, which are `outlines` with their bytes in the arena."""
    outlines: tuple[Outline, ...]
    places: tuple[tuple[int, int], ...]
    """(first byte, length) of each piece."""
    arena_bytes: int
    destination: Destination

    def with_files(self, caller_files: tuple[str, ...]) -> Order:
        """The same, with what the caller has put into the staging."""
        return replace(self, share=replace(self.share, caller_files=caller_files))


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of an order; without a fault it was carried out."""

    fault: str | None = None


class Writer:
    """Carries out orders, one after another."""

    def __init__(self, orders: Connection, arena_fd: int) -> None:
        self._orders = orders
        self._arena_fd = arena_fd
        self._quiet_since = (0.0, 0)

    def run(self) -> None:
        """Until the rank hangs up."""
        while True:
            try:
                order = self._orders.recv()
            except (EOFError, OSError):
                return
            if isinstance(order, Reserve):
                self._reserve(order.nbytes)
            else:
                self._answer(self._carry_out(order))

    def _reserve(self, nbytes: int) -> None:
        try:
            os.posix_fallocate(self._arena_fd, 0, nbytes)
        except OSError:
            return  # the copy itself will meet it again, and say so

    def _carry_out(self, order: Order) -> Outcome:
        rank, destination = order.share.rank, order.destination
        try:
            written = commit.write_share(self._filled(order), destination)
            if rank == 0 and not destination.root.nodes:
                commit.await_parts(
                    destination, is_hopeless=lambda: self._is_hopeless(destination.staging)
                )
                commit.commit(written, destination)
        except Exception as fault:  # whatever it is, the rank must hear of it
            message = str(fault)
            if not isinstance(fault, CheckpointError):
                traceback.print_exc()
                message = f"{type(fault).__name__}: {fault}"
            if destination.root.nodes:
                pass  # the ranks themselves commit, and drop the staging
            elif rank == 0:
                staging.discard(destination.staging)
            else:
                commit.tell_failure(destination.staging, rank, f"rank {rank}: {message}")
            return Outcome(fault=message)
        return Outcome()

    def _filled(self, order: Order) -> Share:
        memory = memoryview(b"")
        if order.arena_bytes:
            mapped = mmap.mmap(self._arena_fd, order.arena_bytes, prot=mmap.PROT_READ)
            memory = memoryview(mapped)
        pieces = tuple(
            outline.filled(memory[begin : begin + length])
            for outline, (begin, length) in zip(order.outlines, order.places, strict=True)
        )
        return replace(order.share, pieces=pieces)

    def _answer(self, outcome: Outcome) -> None:
        try:
            self._orders.send(outcome)
        except OSError:
            if outcome.fault:
                print(outcome.fault, file=sys.stderr)  # noqa: T201 (nobody else will say it)

    def _is_hopeless(self, directory: Path) -> bool:
        """Whether the rank has gone, and what other ranks write has not grown for a while."""
        try:
            if not self._orders.poll(0):
                self._quiet_since = (0.0, 0)
                return False
        except OSError:
            pass
        now, size = time.monotonic(), _size_of(directory)
        if not self._quiet_since[0] or size != self._quiet_since[1]:
            self._quiet_since = (now, size)
        return now - self._quiet_since[0] > _ORPHAN_S


def _size_of(directory: Path) -> int:
    try:
        return sum(path.stat().st_size for path in directory.rglob("*"))
    except OSError:
        return -1


def main() -> None:
    """The process's whole life."""
    for number in IGNORED:
        signal.signal(number, signal.SIG_IGN)
    os.nice(_NICENESS)
    socket, arena = map(int, sys.argv[1:3])
    Writer(Connection(socket), arena).run()


if __name__ == "__main__":
    # Pickled orders name these classes by their module, which must be one and the same.
    from bigtrain.checkpoint import writer

    writer.main()
