"""The logs of all nodes and ranks of a run as one, in the order of time.

Lines of bigtrain's own begin with their time. What a library or a script printed has none and goes
with the line before it in its file; in a file without any times, with the file's last change.
Rank 0's figures, which the console showed as progress, are lines of its log like any others.
"""

from __future__ import annotations

import contextlib
import heapq
import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import BinaryIO

from bigtrain.console import progress_line
from bigtrain.errors import ConfigError
from bigtrain.log_time import read_stamp, stamp

_FOLDER = re.compile(r"node-(\d+)-(.+)")
_METRICS = "metrics.jsonl"
_RANK_LOG = re.compile(r"rank-(\d+)\.log")
_LONGEST_LINE = 1 << 20
_BLOCK_BYTES = 1 << 16
_MERGED_BYTES = 32 << 20
"""Read ahead of all logs of a run together."""


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
    """Reads a log from its start, and later what was appended to it.

    The file is open only while a block of it is read: a run has more logs than a process may have
    files.
    """

    def __init__(self, source: Source) -> None:
        self._source = source
        self._is_metrics = source.path.name == _METRICS
        self._offset = 0
        self._rest = b""
        self._time = 0.0

    def skip_to(self, start: float) -> None:
        """Pass over what is older than `start`, as far as that needs no reading of all of it."""
        with contextlib.suppress(OSError), self._source.path.open("rb") as file:
            low, high = 0, file.seek(0, os.SEEK_END)
            while high - low > _BLOCK_BYTES:
                middle = (low + high) // 2
                when = self._next_time(file, middle)
                if when is not None and when < start:
                    low, self._time = middle, when
                else:
                    high = middle
            if low:
                file.seek(low)
                file.readline(_LONGEST_LINE)
                self._offset = file.tell()

    def lines(
        self, *, is_final: bool = True, block_bytes: int = 16 * _BLOCK_BYTES
    ) -> Iterator[Line]:
        """What is new since the last call. `is_final`: also a line that has no end yet."""
        while block := self._read(block_bytes):
            *whole, self._rest = (self._rest + block).split(b"\n")
            if len(self._rest) >= _LONGEST_LINE:
                whole.append(self._rest)
                self._rest = b""
            for raw in whole:
                yield self._line(raw)
        if is_final and self._rest:
            rest, self._rest = self._rest, b""
            yield self._line(rest)

    def _read(self, number: int) -> bytes:
        try:
            if self._source.path.stat().st_size <= self._offset:
                return b""
            with self._source.path.open("rb") as file:
                self._time = self._time or self._next_time(file, 0) or self._changed()
                file.seek(self._offset)
                block = file.read(number)
        except FileNotFoundError:
            return b""
        self._offset += len(block)
        return block

    def _next_time(self, file: BinaryIO, offset: int) -> float | None:
        """Of the first line after `offset` that has one, if it is near."""
        file.seek(offset)
        if offset:
            file.readline(_LONGEST_LINE)
        while file.tell() - offset < _LONGEST_LINE and (line := file.readline(_LONGEST_LINE)):
            when = self._time_of(line)
            if when is not None:
                return when
        return None

    def _changed(self) -> float:
        return self._source.path.stat().st_mtime

    def _time_of(self, raw: bytes) -> float | None:
        return read_stamp(_as_log_line(raw) if self._is_metrics else raw)

    def _line(self, raw: bytes) -> Line:
        if self._is_metrics:
            raw = _as_log_line(raw)
        self._time = read_stamp(raw) or self._time
        # A progress bar writes itself anew in one line: its last state is what counts.
        text = raw.rstrip(b"\r\n").rpartition(b"\r")[2].decode(errors="replace")
        return Line(time=self._time, label=self._source.label, text=text)


def merged(readers: Sequence[Reader], *, is_final: bool = True) -> Iterator[Line]:
    """All new lines, in the order of time, with a few MiB of them in memory."""
    block_bytes = min(
        16 * _BLOCK_BYTES, max(_BLOCK_BYTES // 4, _MERGED_BYTES // (len(readers) + 1))
    )
    return heapq.merge(*(r.lines(is_final=is_final, block_bytes=block_bytes) for r in readers))


def read_since(text: str, *, now: float) -> float:
    """`10m`, `2h`, `1d`, or a time in ISO 8601 (local, unless it says its zone), as seconds since
    the epoch."""
    short = re.fullmatch(r"(\d+)([smhd])", text)
    if short is not None:
        return now - int(short[1]) * {"s": 1, "m": 60, "h": 3600, "d": 86_400}[short[2]]
    try:
        return datetime.fromisoformat(text).timestamp()
    except (ValueError, OverflowError):
        raise ConfigError(
            f"flag --since: {text!r} is neither 10m, 2h or 1d nor a time as 2026-01-31T12:00"
        ) from None


def _as_log_line(raw: bytes) -> bytes:
    """`{"time": …, "step": 5, "loss": …}` as the line of a log; what is none of it as it is."""
    try:
        figures = json.loads(raw)
        when = float(figures["time"])
        return f"{stamp(when)} {progress_line(figures)}".encode()
    except (ValueError, KeyError, TypeError, OverflowError):
        return raw
