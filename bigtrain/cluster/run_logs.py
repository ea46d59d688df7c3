"""The logs of all nodes and ranks of a run as one, in the order of time.

Lines of bigtrain's own begin with their time. What a library or a script printed has none and goes
with the line before it in its file; in a file without any times, with the file's last change.
Rank 0's figures, which the console showed as progress, are lines of its log like any others.
"""

from __future__ import annotations

import heapq
import json
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from bigtrain.console import progress_line
from bigtrain.errors import ConfigError

_STAMP = re.compile(rb"(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d)[,.](\d{3}) ")
_FOLDER = re.compile(r"node-(\d+)-(.+)")
_METRICS = "metrics.jsonl"
_RANK_LOG = re.compile(r"rank-(\d+)\.log")
_LONGEST_LINE = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Source:
    """One log file, and whose it is."""

    path: Path
    node: str
    node_rank: int
    rank: int | None
    """None: the agent's."""

    @property
    def label(self) -> str:
        """`node2:5`, or `node2:agent`."""
        return f"{self.node}:{'agent' if self.rank is None else self.rank}"


@dataclass(frozen=True, kw_only=True, order=True)
class Line:
    """One line of one log."""

    time: float
    label: str
    text: str = field(compare=False)


def attempts(output_dir: Path) -> list[Path]:
    """The log folders of a run's attempts, the newest last."""
    found = [path for path in (output_dir / "logs").glob("attempt-*") if path.is_dir()]
    return sorted(found, key=lambda path: (len(path.name), path.name))


def sources(attempt: Path, *, ranks: Sequence[int] = (), nodes: Sequence[str] = ()) -> list[Source]:
    """The logs of an attempt; of certain ranks or nodes (by host name or number) where asked."""
    found = []
    for folder in sorted(attempt.glob("node-*")):
        match = _FOLDER.fullmatch(folder.name)
        if match is None or (nodes and not {match[2], str(int(match[1]))} & set(nodes)):
            continue
        for path in sorted(folder.iterdir()):
            rank = _rank_of(path.name)
            is_agent = path.name == "agent.log" and not ranks
            if is_agent or (rank is not None and (not ranks or rank in ranks)):
                node_rank = int(match[1])
                source = Source(path=path, node=match[2], node_rank=node_rank, rank=rank)
                found.append(source)
    return found


def _rank_of(name: str) -> int | None:
    """Whose file it is; None for one that is no rank's."""
    match = _RANK_LOG.fullmatch(name)
    return 0 if name == _METRICS else None if match is None else int(match[1])


class Reader:
    """Reads a log from its start, and later what was appended to it."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._offset = 0
        self._rest = b""
        self._time = 0.0

    def lines(self, *, is_final: bool = True) -> Iterator[Line]:
        """What is new since the last call. `is_final`: also a line that has no end yet."""
        try:
            with self._source.path.open("rb") as file:
                self._time = self._time or _first_time(self._source.path)
                file.seek(self._offset)
                while block := file.readline(_LONGEST_LINE):
                    self._offset += len(block)
                    whole = self._rest + block
                    if whole.endswith(b"\n") or is_final or len(whole) >= _LONGEST_LINE:
                        self._rest = b""
                        yield self._line(whole)
                    else:
                        self._rest = whole
        except FileNotFoundError:
            return

    def _line(self, raw: bytes) -> Line:
        if self._source.path.name == _METRICS:
            raw = _as_log_line(raw)
        stamp = _STAMP.match(raw)
        self._time = (_read_stamp(stamp) if stamp else None) or self._time
        # A progress bar writes itself anew in one line: its last state is what counts.
        text = raw.rstrip(b"\r\n").rpartition(b"\r")[2].decode(errors="replace")
        return Line(time=self._time, label=self._source.label, text=text)


def merged(readers: Sequence[Reader]) -> Iterator[Line]:
    """All lines there are, in the order of time."""
    return heapq.merge(*(reader.lines() for reader in readers))


def read_since(text: str, *, now: float) -> float:
    """`10m`, `2h`, `1d`, or a time such as `2026-01-31 12:00`, as seconds since the epoch."""
    short = re.fullmatch(r"(\d+)([smhd])", text)
    if short is not None:
        return now - int(short[1]) * {"s": 1, "m": 60, "h": 3600, "d": 86_400}[short[2]]
    for form in ("%Y-%m-%d %H:%M:%S", "%Y-%m-%d %H:%M", "%Y-%m-%d", "%Y-%m-%dT%H:%M:%S"):
        try:
            return time.mktime(time.strptime(text, form))
        except ValueError:
            continue
    raise ConfigError(f"flag --since: {text!r} is neither 10m, 2h or 1d nor 2026-01-31 12:00")


def _as_log_line(raw: bytes) -> bytes:
    """`{"time": …, "step": 5, "loss": …}` as the line of a log; what is none of it as it is."""
    try:
        figures = json.loads(raw)
        when = float(figures["time"])
        stamp = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(when))
        return f"{stamp},{int(when % 1 * 1000):03d} {progress_line(figures)}\n".encode()
    except (ValueError, KeyError, TypeError, OverflowError):
        return raw


def _first_time(path: Path) -> float:
    """Of the first line that has one: those before it, too, belong there."""
    with path.open("rb") as file:
        for _ in range(1000):
            line = file.readline(_LONGEST_LINE)
            stamp = _STAMP.match(line)
            if not line or stamp:
                break
    return (_read_stamp(stamp) if stamp else None) or path.stat().st_mtime


def _read_stamp(stamp: re.Match[bytes]) -> float | None:
    try:
        whole = time.strptime(stamp[1].decode(), "%Y-%m-%d %H:%M:%S")
    except ValueError:
        return None
    return time.mktime(whole) + int(stamp[2]) / 1000
