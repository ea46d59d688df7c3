"""Word from a rank to its agent: what a person should see while the run goes on.

Each event is one line of JSON in a pipe whose number is in `BIGTRAIN_EVENT_FD`. Without the
variable (no agent) nothing is sent. An event never holds training up: if the pipe is full it is
dropped, and the logs and metrics on disk still have it all.

Kinds: `progress` (step, total, loss, learning_rate, tokens_per_s, eta_s, …), `notice` (text),
`evaluated` (step, the metrics), `warning` and `error` (text), `saved` (path, step), `failed`,
`done`.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import stat
from typing import Any

EVENT_VARIABLE = "BIGTRAIN_EVENT_FD"

_LARGEST_EVENT = 4000
"""Bytes. Below PIPE_BUF, so that lines of a rank and of its data workers never mix."""


def describe_pipe(fd: int) -> str:
    """The value of `BIGTRAIN_EVENT_FD` for a pipe: its number, and the pipe's own identity.

    A program that a rank starts inherits the variable but not the pipe. The identity keeps it
    from writing into whatever file has the number there.
    """
    return f"{fd}:{os.fstat(fd).st_ino}"


def emit(kind: str, **fields: Any) -> None:
    """Send one event; does nothing without an agent. Values that JSON lacks are sent as text."""
    fd = _event_pipe()
    if fd is None:
        return
    with contextlib.suppress(OSError):  # full, or the agent is gone: not the training's concern
        os.write(fd, _encode({"kind": kind, **fields}))


class EventHandler(logging.Handler):
    """Passes log records on as events: rank 0's from INFO on, the others' from WARNING on."""

    def __init__(self, *, is_main: bool) -> None:
        super().__init__(logging.INFO if is_main else logging.WARNING)

    def emit(self, record: logging.LogRecord) -> None:
        try:
            emit(_kind_of(record.levelno), text=record.getMessage())
        except Exception:  # a record with wrong arguments, as every logging handler treats it
            self.handleError(record)


def _kind_of(level: int) -> str:
    if level >= logging.ERROR:
        return "error"
    return "warning" if level >= logging.WARNING else "notice"


def _event_pipe() -> int | None:
    number, _, identity = os.environ.get(EVENT_VARIABLE, "").partition(":")
    if not number.isdigit():
        return None
    try:
        status = os.fstat(int(number))
    except OSError:
        return None
    is_ours = stat.S_ISFIFO(status.st_mode) and str(status.st_ino) == identity
    return int(number) if is_ours else None


def _encode(event: dict[str, Any]) -> bytes:
    line = json.dumps(event, default=str).encode() + b"\n"
    if len(line) <= _LARGEST_EVENT:
        return line
    short = {name: _shortened(value) for name, value in event.items()}
    line = json.dumps(short, default=str).encode() + b"\n"
    if len(line) <= _LARGEST_EVENT:
        return line
    return json.dumps({"kind": event["kind"]}).encode() + b"\n"


def _shortened(value: Any) -> Any:
    # A character takes at most 12 bytes of JSON, as two escaped surrogates.
    return value[:300] + " …" if isinstance(value, str) and len(value) > 300 else value
