"""What a person sees of a run: one calm line of progress, and whatever needs attention.

The launcher's own words and the ranks' events come in here; nothing else in bigtrain writes to a
terminal during a run. Progress, notices and the output of a user's script go to stdout, words of
the launcher and warnings to stderr. With `--json` everything is one JSON object per line on stdout.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TextIO

if TYPE_CHECKING:
    from rich.live import Live


@dataclass(frozen=True, kw_only=True)
class Event:
    """One event of one rank, with its fields as the rank sent them."""

    node_rank: int
    rank: int
    kind: str
    fields: Mapping[str, Any]


class Console(Protocol):
    """Where the launcher shows things."""

    def say(self, text: str) -> None:
        """A calm word of the launcher."""

    def fail(self, text: str, *, details: Mapping[str, Any] | None = None) -> None:
        """Why the run ended badly, or what is about to; `details` say the same to programs."""

    def show(self, event: Event) -> None:
        """An event of a rank."""

    def output(self, data: bytes) -> None:
        """What rank 0 of a user's script printed."""

    def end(self, summary: Mapping[str, Any]) -> None:
        """The run is over: how, and where what it left is. For programs: people were told."""

    def close(self) -> None:
        """Leave the terminal tidy. Safe to call twice."""


def open_console(*, as_json: bool = False) -> Console:
    """The console that fits: JSON lines, a live line on a terminal, or plain lines."""
    if as_json:
        return JsonConsole(sys.stdout)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # what it can't encode is shown as well as may be
            stream.reconfigure(errors="backslashreplace")
    if sys.stdout.isatty():
        return TerminalConsole(sys.stdout, sys.stderr)
    return PlainConsole(sys.stdout, sys.stderr)


class PlainConsole:
    """Lines, for files, pipes and job logs."""

    def __init__(self, out: TextIO, err: TextIO) -> None:
        self._out = out
        self._err = err

    def say(self, text: str) -> None:
        _print(self._err, text)

    def fail(self, text: str, *, details: Mapping[str, Any] | None = None) -> None:
        _print(self._err, text)

    def show(self, event: Event) -> None:
        text = event_line(event)
        if text is not None:
            _print(self._err if event.kind in ("warning", "error") else self._out, text)

    def output(self, data: bytes) -> None:
        _write_bytes(self._out, data)

    def end(self, summary: Mapping[str, Any]) -> None:
        pass

    def close(self) -> None:
        _flush(self._out)


class TerminalConsole(PlainConsole):
    """The same with progress in one line that is rewritten in place."""

    def __init__(self, out: TextIO, err: TextIO) -> None:
        super().__init__(out, err)
        self._live: Live | None = None

    def say(self, text: str) -> None:
        self._clear()
        super().say(text)

    def fail(self, text: str, *, details: Mapping[str, Any] | None = None) -> None:
        self._clear()
        super().fail(text, details=details)

    def show(self, event: Event) -> None:
        if event.kind != "progress":
            self._clear()
            super().show(event)
            return
        from rich.text import Text

        line = Text(progress_line(event.fields), no_wrap=True, overflow="ellipsis")
        line.stylize("bold", 0, len(line.plain.partition("  ")[0]))
        self._line().update(line, refresh=True)

    def output(self, data: bytes) -> None:
        self._clear()
        super().output(data)

    def close(self) -> None:
        if self._live is not None:
            self._live.transient = False  # the last state stays
            self._live.stop()
            self._live = None
        super().close()

    def _line(self) -> Live:
        if self._live is None:
            from rich.console import Console as RichConsole
            from rich.live import Live

            # No refresh thread: the agent stays a single-threaded process.
            self._live = Live(
                console=RichConsole(file=self._out),
                auto_refresh=False,
                transient=True,
                redirect_stdout=False,
                redirect_stderr=False,
            )
            self._live.start()
        return self._live

    def _clear(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None


class JsonConsole:
    """One JSON object per line, for programs."""

    def __init__(self, out: TextIO) -> None:
        self._out = out

    def say(self, text: str) -> None:
        self._write({"kind": "launcher", "text": text})

    def fail(self, text: str, *, details: Mapping[str, Any] | None = None) -> None:
        self._write({"kind": "failure", "text": text, **(details or {})})

    def show(self, event: Event) -> None:
        self._write(
            {**event.fields, "kind": event.kind, "rank": event.rank, "node_rank": event.node_rank}
        )

    def output(self, data: bytes) -> None:
        self._write({"kind": "output", "rank": 0, "text": data.decode(errors="replace")})

    def end(self, summary: Mapping[str, Any]) -> None:
        self._write({"kind": "end", **summary})

    def close(self) -> None:
        _flush(self._out)

    def _write(self, record: Mapping[str, Any]) -> None:
        _print(self._out, json.dumps(finite(record), allow_nan=False, default=str))


def event_line(event: Event) -> str | None:
    """An event in words; None for one that is not for people's eyes."""
    fields = event.fields
    if event.kind == "progress":
        return progress_line(fields)
    if event.kind == "notice":
        return str(fields.get("text", "")) if event.rank == 0 else None
    if event.kind in ("warning", "error"):
        prefix = "" if event.rank == 0 else f"[{event.node_rank}:{event.rank}] "
        return f"{prefix}{event.kind}: {fields.get('text', '')}"
    if event.kind == "evaluated" and event.rank == 0:
        return _evaluation_line(fields)
    if event.kind == "saved" and event.rank == 0:
        return f"saved {fields.get('path', '')}"
    return None


def progress_line(fields: Mapping[str, Any]) -> str:
    """`step 20/200  loss 3.412  lr 2.9e-04  1.2k tok/s  eta 0:41`, of what is known."""
    step, total = fields.get("step"), fields.get("total")
    parts = [f"step {step}/{total}" if total else f"step {step}"]
    for name, label, form in _FIGURES:
        value = fields.get(name)
        if isinstance(value, (int, float)):
            parts.append(f"{label} {value:{form}}")
    speed, eta = fields.get("tokens_per_s"), fields.get("eta_s")
    if isinstance(speed, (int, float)) and math.isfinite(speed):
        parts.append(f"{_short(speed)} tok/s")
    if isinstance(eta, (int, float)) and math.isfinite(eta):
        parts.append(f"eta {_clock(eta)}")
    return "  ".join(parts)


def _evaluation_line(fields: Mapping[str, Any]) -> str | None:
    """`step 50: eval_loss 2.4113`; None where no loss was computed."""
    losses = [
        f"{name} {value:.4f}"
        for name, value in fields.items()
        if name.endswith("_loss") and isinstance(value, (int, float))
    ]
    return f"step {fields.get('step')}: {', '.join(losses)}" if losses else None


_FIGURES = (
    ("loss", "loss", ".3f"),
    ("eval_loss", "eval loss", ".3f"),
    ("grad_norm", "norm", ".2f"),
    ("learning_rate", "lr", ".1e"),
)


def _short(number: float) -> str:
    for size, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.1f}{suffix}"
    return f"{number:.0f}"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: null stands for them."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {name: finite(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return value


def _print(stream: TextIO, text: str) -> None:
    """A reader that has left (`| head`), or a full disk under it, does not end a training run."""
    with contextlib.suppress(OSError, ValueError):
        stream.write(text + "\n")
        stream.flush()


def _write_bytes(stream: TextIO, data: bytes) -> None:
    try:
        stream.flush()
        if hasattr(stream, "buffer"):
            stream.buffer.write(data)
        else:
            stream.write(data.decode(errors="replace"))
        stream.flush()
    except (OSError, ValueError):
        pass


def _flush(stream: TextIO) -> None:
    with contextlib.suppress(OSError, ValueError):
        stream.flush()
