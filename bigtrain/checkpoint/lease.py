"""One run writes to an output directory at a time: who does has left a lease there.

    .bigtrain-lease/<token>.json    who holds it; touched every few seconds for as long as he lives

The directory holds one file or none. It is made complete beside its place and renamed there, which
works only where no file is in it: so of many at once one gets it. A dead holder's file is removed
by its own name, which nobody else's ever has: so however late somebody acts on what he has seen,
he can't remove a lease that was taken meanwhile.

A holder of this machine is looked up by his process: alive or dead, the answer is certain and at
once. One of another machine is alive while the file is touched, by the file server's own clock;
nobody who is dead keeps a run from going on longer than `PATIENCE_S`. A holder who only seemed
dead finds at his next save that the lease is another's, and writes no more.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import socket
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from bigtrain.checkpoint.processes import machine, started
from bigtrain.errors import CheckpointError

LEASE = ".bigtrain-lease"
BEAT_S = 5.0
PATIENCE_S = 45.0
"""After so long without a touch the holder is dead."""
_POLL_S = 0.5
_AGAIN_S = 0.01
_TAKEN = (errno.ENOTEMPTY, errno.EEXIST)


@dataclass(frozen=True, kw_only=True)
class Holder:
    """A process that writes to an output directory."""

    token: str
    """Of this one taking of the lease."""
    launch: str
    """What the attempts of one launch have in common; empty without a launcher."""
    host: str
    machine: str
    pid: int
    started: str
    """As `processes` has it."""

    @classmethod
    def here(cls, *, launch: str) -> Holder:
        """This process."""
        return cls(
            token=uuid.uuid4().hex,
            launch=launch,
            host=socket.gethostname(),
            machine=machine(),
            pid=os.getpid(),
            started=started(os.getpid()),
        )

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


class Lease:
    """Held from `take` to `release`."""

    def __init__(self, place: Path, holder: Holder) -> None:
        self._place = place
        self._mine = _file(place, holder)
        self._ends = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="lease", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raise CheckpointError where another run has taken it over meanwhile."""
        found = _held(self._place)
        if found is None or found == self._mine:
            return  # removed by hand, or ours
        raise CheckpointError(
            f"{self._place.parent} was taken over by {_read(found) or 'another run'}, as if this "
            "run were dead; it writes no checkpoint any more. Let only one run go on"
        )

    def release(self) -> None:
        """Let others have it. Safe to call twice."""
        self._ends.set()
        self._thread.join()
        _remove(self._mine)

    def _beat(self) -> None:
        while not self._ends.wait(BEAT_S):
            try:
                os.utime(self._mine)
            except OSError:
                continue  # whoever needs the disk will say what is wrong with it


def take(output_dir: Path, *, launch: str = "", is_restarted: bool = False) -> Lease:
    """The lease on `output_dir`, which is made. Waits for a dead holder of another machine.

    CheckpointError where another lives; OSError where the directory can't be written to. A launch
    that has started its ranks again ended the ones before, wherever they were.
    """
    output_dir.mkdir(parents=True, exist_ok=True)
    place, mine = output_dir / LEASE, Holder.here(launch=launch)
    give_up = time.monotonic() + PATIENCE_S
    while not _enter(place, mine):
        found = _held(place)
        if found is None:
            if time.monotonic() > give_up:
                raise OSError(f"{place} holds what no run has left there; remove it")
            time.sleep(_AGAIN_S)  # just released; NFS may take a moment to see it
            continue
        holder = _read(found)
        if holder is not None:
            is_own_launch = is_restarted and launch and holder.launch == launch
            if not is_own_launch and is_alive(output_dir, holder):
                raise CheckpointError(in_use(output_dir, holder))
        _remove(found)  # he is dead, or what he wrote was cut off with him
    return Lease(place, mine)


def living_holder(output_dir: Path) -> Holder | None:
    """Who writes there now; may take `PATIENCE_S` where he is of another machine."""
    found = _held(output_dir / LEASE)
    holder = _read(found) if found is not None else None
    return holder if holder is not None and is_alive(output_dir, holder) else None


def in_use(output_dir: Path, holder: Holder) -> str:
    """The message of a run that is too many."""
    return (
        f"{output_dir} is being written to by another run ({holder}); wait until it has ended, "
        "stop it, or give another output_dir"
    )


def is_alive(
    output_dir: Path,
    holder: Holder,
    *,
    patience_s: float = PATIENCE_S,
    sleep: Callable[[float], None] = time.sleep,
) -> bool:
    """Whether the holder still runs."""
    if holder.machine == machine():
        is_me = holder.pid == os.getpid()
        return not is_me and holder.started == started(holder.pid) != ""
    file = _file(output_dir / LEASE, holder)
    touched = _touched(file)
    give_up = time.monotonic() + patience_s - _age(output_dir, touched)
    while time.monotonic() < give_up:
        sleep(_POLL_S)
        if _touched(file) != touched:
            return _read(file) == holder
    return False


def _enter(place: Path, holder: Holder) -> bool:
    """Put the holder's file there, unless one is there."""
    whole = place.with_name(f"{LEASE}.{holder.token}")
    whole.mkdir()
    try:
        _file(whole, holder).write_text(json.dumps(asdict(holder)), encoding="utf-8")
        with contextlib.suppress(OSError):
            place.rmdir()  # what a dead one left empty; some file systems rename onto nothing
        try:
            whole.rename(place)
        except OSError as fault:
            if _file(place, holder).exists():
                return True  # a server had done it, and its answer was lost
            if fault.errno not in _TAKEN:
                raise
            return False
        return True
    finally:
        shutil.rmtree(whole, ignore_errors=True)


def _held(place: Path) -> Path | None:
    """The file of who holds it; None where nobody does."""
    try:
        return next((path for path in place.iterdir() if path.suffix == ".json"), None)
    except (FileNotFoundError, NotADirectoryError):
        return None


def _remove(file: Path) -> None:
    """Remove this holder's own file, and nobody else's; it may be gone."""
    file.unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        file.parent.rmdir()  # not where the next one is in it


def _file(place: Path, holder: Holder) -> Path:
    return place / f"{holder.token}.json"


def _read(file: Path) -> Holder | None:
    """Who wrote it; None where it has gone, or is not whole."""
    try:
        holder = Holder(**json.loads(file.read_text(encoding="utf-8")))
    except (FileNotFoundError, ValueError, TypeError):
        return None
    return holder if holder.token == file.stem else None


def _touched(file: Path) -> int:
    try:
        # Opened, because NFS then asks the server, and doesn't answer from what it remembers.
        with file.open("rb") as opened:
            return os.fstat(opened.fileno()).st_mtime_ns
    except OSError:
        return 0


def _age(output_dir: Path, touched: int) -> float:
    """Seconds since then, both times by the clock of who keeps the files."""
    probe = output_dir / f"{LEASE}.{uuid.uuid4().hex}"
    try:
        probe.touch()
        return max(0.0, (probe.stat().st_mtime_ns - touched) / 1e9)
    except OSError:
        return 0.0
    finally:
        probe.unlink(missing_ok=True)
