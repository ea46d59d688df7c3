"""Why a rank ended badly: what the rank leaves in a file, and what a person is told.

The rank writes a report of its exception as it dies (`record`); the agent reads the reports of
all ranks, finds the one that failed first (`first_failure`) and puts it into words (`describe`).
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import time
import traceback
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType

from bigtrain.errors import BigtrainError

_LAUNCHER_FILES = frozenset(
    {"<string>", *(str(Path(__file__).with_name(f"{n}.py")) for n in ("fork_server", "rank"))}
)
_LOST_PEER = re.compile(
    r"connection (reset|closed|refused|aborted|was (reset|closed))|broken pipe|closed by peer"
    r"|remote (peer|process)|(recv|send)(Value|Bytes|Vector) failed|failed to (recv|send)",
    re.IGNORECASE,
)
"""What gloo, NCCL and the store say when the process at the other end is gone."""
_TAIL_LINES = 12
_TAIL_BYTES = 16_384


@dataclass(frozen=True, kw_only=True)
class ErrorReport:
    """The exception that ended a rank."""

    rank: int
    host: str
    time: float
    """Seconds since the epoch: the first failure of all ranks is the cause of the others."""
    type: str
    message: str
    traceback: str
    """As Python prints it, from the user's or bigtrain's first frame on; empty for a user's
    mistake, which its message tells whole."""
    exit_code: int


@dataclass(frozen=True, kw_only=True)
class RankExit:
    """How a rank's process left."""

    rank: int
    host: str
    status: int
    """Exit code, or minus the signal's number."""
    time: float
    log: Path
    report: ErrorReport | None
    ended_by_us: bool
    """True when the agent had already told it to leave."""

    @property
    def is_bad(self) -> bool:
        return self.status != 0 or self.report is not None

    @property
    def failed_at(self) -> float:
        return self.time if self.report is None else self.report.time

    @property
    def exit_code(self) -> int:
        """As a shell has it."""
        if self.report is not None and (self.ended_by_us or self.status == 0):
            return self.report.exit_code
        return self.status if self.status >= 0 else 128 - self.status


def record(error: BaseException, *, path: Path, rank: int, host: str) -> None:
    """Leave word of the exception that ends this rank; never raises."""
    expected = isinstance(error, BigtrainError)
    report = ErrorReport(
        rank=rank,
        host=host,
        time=time.time(),
        type=type(error).__qualname__,
        message=_text(error),
        traceback="" if expected else _formatted(error),
        exit_code=error.exit_code if isinstance(error, BigtrainError) else 1,
    )
    staged = path.with_suffix(".partial")
    # A full disk may be the very cause: the exit code and the log still tell.
    with contextlib.suppress(OSError):
        staged.write_text(json.dumps(asdict(report)), encoding="utf-8")
        staged.replace(path)


def read(path: Path) -> ErrorReport | None:
    """What a rank left; None if it left nothing that can be read."""
    try:
        return ErrorReport(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def own_frames(trace: TracebackType | None) -> TracebackType | None:
    """The traceback without the launcher's frames at its start."""
    while trace is not None and trace.tb_frame.f_code.co_filename in _LAUNCHER_FILES:
        trace = trace.tb_next
    return trace


def first_failure(exits: Iterable[RankExit]) -> RankExit | None:
    """The failure that caused the others; None when no rank failed by itself.

    The first by time, among those that look least like a consequence. Time alone would accuse a
    peer: it may report a lost connection before the agent has seen the death that cut it.
    """
    failed = [e for e in exits if e.is_bad and (e.report is not None or not e.ended_by_us)]
    return min(failed, key=lambda e: (_looks_caused(e), e.failed_at), default=None)


def describe(failure: RankExit) -> str:
    """What happened, the end of the rank's own traceback or log, and where the log is."""
    lines = [f"rank {failure.rank} on {failure.host} {_ending(failure)}"]
    lines += [f"  {line}" for line in _evidence(failure)]
    lines.append(f"its log: {failure.log}")
    return "\n".join(lines)


def details(failure: RankExit) -> dict[str, str | int]:
    """What `describe` says, for programs."""
    return {
        "rank": failure.rank,
        "host": failure.host,
        "exit_code": failure.exit_code,
        "error": failure.report.type if failure.report is not None else "",
        "log": str(failure.log),
    }


def signal_name(number: int) -> str:
    """`SIGTERM` for 15; the number where the signal has no name."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def log_tail(path: Path) -> list[str]:
    """The last lines of a log, as far as they can be read."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL_BYTES))
            text = file.read().decode(errors="replace")
    except OSError:
        return []
    # A progress bar rewrites its line with carriage returns: only the last state was to be seen.
    lines = [line.rstrip().rpartition("\r")[2] for line in text.split("\n")]
    return [line for line in lines if line][-_TAIL_LINES:]


def _looks_caused(failure: RankExit) -> int:
    """0: a cause beyond doubt, 1: by itself as far as can be told, 2: often by another's death."""
    if failure.report is not None:
        return 2 if _LOST_PEER.search(failure.report.message) else 1
    if failure.status >= 0:
        return 1
    # A collective that is torn apart may abort; no other signal comes of what a peer does.
    return 2 if failure.status == -signal.SIGABRT else 0


def _ending(failure: RankExit) -> str:
    if failure.status >= 0 or failure.ended_by_us:
        return f"failed with exit code {failure.exit_code}"
    text = f"was killed by {signal_name(-failure.status)}"
    if failure.status == -signal.SIGKILL:
        text += " (often the kernel's out-of-memory killer: see dmesg)"
    return text


def _evidence(failure: RankExit) -> list[str]:
    if failure.report is None:
        return log_tail(failure.log)
    if not failure.report.traceback:
        return failure.report.message.splitlines()
    return failure.report.traceback.splitlines()[-_TAIL_LINES:]


def _formatted(error: BaseException) -> str:
    trace = own_frames(error.__traceback__)
    return "".join(traceback.format_exception(type(error), error, trace))


def _text(error: BaseException) -> str:
    try:
        return str(error)
    except Exception:  # a __str__ of the user's that raises must not hide the failure
        return f"<{type(error).__qualname__} that can't be shown>"
