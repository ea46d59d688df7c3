"""One run writes to an output directory at a time: who does has left a lease there.

    .bigtrain-lease.json    who holds it; touched every few seconds for as long as he lives

A holder of this machine is looked up by his process: alive or dead, the answer is certain and at
once. One of another machine is alive while the file is touched, by the file server's own clock;
nobody who is dead keeps a run from going on longer than `PATIENCE_S`. A holder who only seemed
dead finds at his next save that the lease is another's, and writes no more.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from bigtrain.checkpoint.processes import machine, started
from bigtrain.errors import CheckpointError

LEASE = ".bigtrain-lease.json"
BEAT_S = 5.0
PATIENCE_S = 45.0
"""After so long without a touch the holder is dead."""
_POLL_S = 0.5


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

    def __init__(self, output_dir: Path, holder: Holder) -> None:
        self._path = output_dir / LEASE
        self._holder = holder
        self._ends = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="lease", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raise CheckpointError where another run has taken it over meanwhile."""
        holder = _read(self._path)
        if holder is None or holder.token == self._holder.token:
            return  # removed by hand, or ours
        raise CheckpointError(
            f"{self._path.parent} was taken over by {holder}, as if this run were dead; it writes "
            "no checkpoint any more. Let only one run go on"
        )

    def release(self) -> None:
        """Let others have it. Safe to call twice."""
        self._ends.set()
        self._thread.join()
        holder = _read(self._path)
        if holder is not None and holder.token == self._holder.token:
            self._path.unlink(missing_ok=True)

    def _beat(self) -> None:
        while not self._ends.wait(BEAT_S):
            try:
                os.utime(self._path)
            except OSError:
                continue  # whoever needs the disk will say what is wrong with it


def take(output_dir: Path, *, launch: str = "", is_restarted: bool = False) -> Lease:
    """The lease on `output_dir`, which is made. Waits for a dead holder of another machine.

    CheckpointError where another lives. A launch that has started its ranks again ended the ones
    before, wherever they were.
    """
    output_dir.mkdir(parents=True, exist_ok=True)
    path, mine = output_dir / LEASE, Holder.here(launch=launch)
    while not _create(path, mine):
        holder = _read(path)
        if holder is None:
            # Written at once, so what can't be read was cut off, or has just been released.
            path.unlink(missing_ok=True)
            continue
        is_own_launch = is_restarted and launch and holder.launch == launch
        if not is_own_launch and is_alive(output_dir, holder):
            raise CheckpointError(in_use(output_dir, holder))
        _remove(path, holder)
    return Lease(output_dir, mine)


def living_holder(output_dir: Path) -> Holder | None:
    """Who writes there now; may take `PATIENCE_S` where he is of another machine."""
    holder = _read(output_dir / LEASE)
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
    path = output_dir / LEASE
    touched = _touched(path)
    give_up = time.monotonic() + patience_s - _age(output_dir, touched)
    while time.monotonic() < give_up:
        sleep(_POLL_S)
        if _touched(path) != touched:
            return _read(path) == holder
    return False


def _create(path: Path, holder: Holder) -> bool:
    """Put it there whole, unless one is there: a link is made once, on NFS too."""
    whole = path.with_name(f"{LEASE}.{holder.token}")
    try:
        whole.write_text(json.dumps(asdict(holder)), encoding="utf-8")
        try:
            os.link(whole, path)
        except FileExistsError:
            return False
        except OSError:  # a file system without links
            return _create_by_itself(path, whole.read_bytes())
        return True
    finally:
        whole.unlink(missing_ok=True)


def _create_by_itself(path: Path, content: bytes) -> bool:
    try:
        with path.open("xb") as file:
            file.write(content)
    except FileExistsError:
        return False
    return True


def _remove(path: Path, dead: Holder) -> None:
    """Remove the dead one's, which gets a name of its own first: only one can do that. What turns
    out to be a new holder's goes back."""
    aside = path.with_name(f"{LEASE}.{uuid.uuid4().hex}")
    try:
        path.rename(aside)
    except FileNotFoundError:
        return
    try:
        if _read(aside) != dead and not path.exists():
            os.link(aside, path)
    except OSError:
        return
    finally:
        aside.unlink(missing_ok=True)


def _read(path: Path) -> Holder | None:
    try:
        return Holder(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def _touched(path: Path) -> int:
    try:
        # Opened, because NFS then asks the server, and doesn't answer from what it remembers.
        with path.open("rb") as file:
            return os.fstat(file.fileno()).st_mtime_ns
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
