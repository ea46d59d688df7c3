"""The output while it is being made: one attempt at a time, and where to go on after a break.

    <output>.partial/                the output's directory before it has its name
    <output>.partial/journal.jsonl   which tensors are on the disk, with their hashes

A tensor is entered after it was synced. An attempt that goes on reads what was entered again, and
takes it only if its hash is right.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import shutil
import threading
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import suppress
from itertools import takewhile
from pathlib import Path
from types import TracebackType
from typing import IO, Any, NamedTuple

from bigtrain.checkpoint.consolidate.digest import Digest, digest_range
from bigtrain.checkpoint.consolidate.frames import OutputTensor
from bigtrain.checkpoint.consolidate.layout import OutputFile
from bigtrain.checkpoint.consolidate.outlet import write_all
from bigtrain.checkpoint.json_object import json_object
from bigtrain.checkpoint.staging import free_bytes, sync_directory
from bigtrain.errors import CheckpointError

logger = logging.getLogger(__name__)

SUFFIX = ".partial"
_JOURNAL = "journal.jsonl"
_BUFFER_BYTES = 1 << 20


class SpoiledError(CheckpointError):
    """The source, or what was made of it, is not what was written: no use in going on."""


class _Entry(NamedTuple):
    """A tensor that was copied."""

    end: int
    """The byte after its last, in the output's file."""
    name: str
    xxh3: str
    infinite: int


_FIELDS = {"file": str, "end": int, "name": str, "xxh3": str, "infinite": int}
"""Of a tensor's line."""


class FileJournal:
    """The part of the journal that is about one file."""

    def __init__(self, name: str, earlier: list[_Entry], staging: Staging) -> None:
        self._name = name
        self._earlier = {entry.name: entry for entry in earlier}
        self._staging = staging
        self._pending: deque[_Entry] = deque()
        self.hashes = {entry.name: entry.xxh3 for entry in earlier}
        self.overflowed: dict[str, int] = {}

    def finished(self, file: OutputFile, fd: int) -> tuple[list[OutputTensor], Digest, list[int]]:
        """The first tensors of the file that an earlier attempt finished, the digest of all up to
        their end, and their CRC-32s where the file's frame needs them."""
        frame = file.frame
        whole = Digest(frame.header)
        found: list[OutputTensor] = []
        crcs: list[int] = []
        for number, tensor in enumerate(file.tensors):
            entry = self._earlier.get(tensor.name)
            end = frame.offsets[number] + tensor.nbytes
            if entry is None or entry.end != end:
                break
            longer, own = whole.copy(), Digest(needs_crc=frame.needs_crc)
            _write_at(fd, frame.lead(number), end=frame.offsets[number], digest=longer)
            digest_range(fd, frame.offsets[number], tensor.nbytes, longer, own)
            if own.hexdigest() != entry.xxh3:
                logger.warning("%s: %s is not as it was; written anew", self._name, tensor.name)
                break
            tail = frame.tail(number, own.crc32)
            _write_at(fd, tail, end=end + len(tail), digest=longer)
            if entry.infinite:
                self.overflowed[tensor.name] = entry.infinite
            whole = longer
            found.append(tensor)
            crcs.append(own.crc32)
        return found, whole, crcs

    def copied(self, name: str, digest: str, *, end: int, infinite: int) -> None:
        """A tensor was handed to the system, up to byte `end`; it may not be on the disk yet."""
        self._pending.append(_Entry(end, name, digest, infinite))

    def synced(self, reached: int) -> None:
        """All bytes before `reached` are on the disk."""
        lines = []
        while self._pending and self._pending[0].end <= reached:
            lines.append({"file": self._name, **self._pending.popleft()._asdict()})
        self._staging.append(lines)


class Staging:
    """The directory in which the output is made. Only one process can have it open: it holds a
    lock on the journal, which moves to the output's name along with what it is about.

    Use it in a `with`: on leaving by a fault, what is there stays for another attempt to go on
    with, unless that is nothing or a SpoiledError says that it is of no use.
    """

    def __init__(self, output: Path, *, fingerprint: str, resume: bool) -> None:
        self.output = output
        self.path = partial_of(output)
        self._refuse_others()
        self._guard = threading.Lock()
        self._entries: dict[str, list[_Entry]] = {}
        self._has_entries = False
        self._is_committed = False
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._journal: IO[str] = (self.path / _JOURNAL).open(
                "a+", encoding="utf-8", errors="replace"
            )
        except OSError as fault:
            raise CheckpointError(f"{self.path}: can't be made: {fault.strerror}") from fault
        try:
            self._lock()
            self._begin(fingerprint, resume=resume)
        except BaseException:
            self._journal.close()
            raise

    def file(self, name: str) -> FileJournal:
        """The journal of one of the output's files."""
        return FileJournal(name, self._entries.get(name, []), self)

    def append(self, lines: list[dict[str, Any]]) -> None:
        """Enter what is on the disk. Called from several threads."""
        if lines:
            with self._guard:
                self._write(lines)
                self._has_entries = True

    def check_space(self, needed: int) -> None:
        """Raise unless `needed` bytes fit, of which some may be there already."""
        there = [path for path in self.path.iterdir() if path.name != _JOURNAL]
        blocks = sum(path.stat().st_blocks * 512 for path in there)
        free = free_bytes(self.path)
        if needed - blocks > free:
            raise CheckpointError(
                f"no space for {self.output}: it takes {needed - blocks:,} bytes more, and "
                f"{free:,} are free; free some, or choose another place or dtype"
            )

    def write_file(self, name: str, content: bytes) -> None:
        """Write a small file; on the disk afterwards."""
        with (self.path / name).open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())

    def copy_file(self, name: str, source: Path) -> None:
        """Copy a file that needn't be small; on the disk afterwards."""
        with source.open("rb") as given, (self.path / name).open("wb") as file:
            shutil.copyfileobj(given, file, _BUFFER_BYTES)
            file.flush()
            os.fsync(file.fileno())

    def commit(self) -> None:
        """Give the finished output its name; it survives a loss of power afterwards."""
        try:
            sync_directory(self.path)
            self.path.rename(self.output)  # replaces an empty directory, and nothing else
            sync_directory(self.output.parent)
        except OSError as fault:
            raise CheckpointError(
                f"{self.path} is whole, but can't be named {self.output}: {fault.strerror}"
            ) from fault
        self._is_committed = True
        with suppress(OSError):  # a file too many in the directory harms nobody
            (self.output / _JOURNAL).unlink()
        self.close()

    def discard(self) -> None:
        """Remove all that was written."""
        shutil.rmtree(self.path, ignore_errors=True)
        self.close()

    def __enter__(self) -> Staging:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, fault: BaseException | None, _: TracebackType | None
    ) -> None:
        if fault is not None and not self._is_committed:
            if self._has_entries and not isinstance(fault, SpoiledError):
                logger.warning("%s: kept, to go on with (--resume)", self.path)
            else:
                self.discard()
        self.close()

    def close(self) -> None:
        """Let others have the directory. Safe to call twice."""
        with suppress(OSError):  # a full disk, which doesn't take what was to be entered last
            self._journal.close()

    def _lock(self) -> None:
        try:
            fcntl.flock(self._journal.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise self._busy() from None
        try:
            named = (self.path / _JOURNAL).stat()
        except OSError:
            raise self._busy() from None
        if not os.path.samestat(os.fstat(self._journal.fileno()), named):
            raise self._busy()  # it ended since we opened the journal

    def _busy(self) -> CheckpointError:
        return CheckpointError(f"{self.output} is being written by another process")

    def _refuse_others(self) -> None:
        """A directory of that name which is none of ours stays as it is."""
        if self.path.is_dir() and not (self.path / _JOURNAL).is_file() and any(self.path.iterdir()):
            raise self._not_ours()

    def _not_ours(self) -> CheckpointError:
        return CheckpointError(
            f"{self.path} is where {self.output.name} is made, but holds files that no "
            "consolidation wrote; move it away or give another output"
        )

    def _begin(self, fingerprint: str, *, resume: bool) -> None:
        self._journal.seek(0)
        text = self._journal.read()
        lines = list(_whole_lines(text))
        known = lines[0].get("fingerprint") if lines else None
        if resume and known not in (None, fingerprint):
            raise CheckpointError(
                f"{self.path}: was begun from another source or with other options; give the same "
                "ones, or leave out --resume to begin anew"
            )
        if resume and known:
            for line in takewhile(_is_entry, lines[1:]):
                self._entries.setdefault(line.pop("file"), []).append(_Entry(**line))
            self._has_entries = bool(self._entries)
            return
        others = [path for path in self.path.iterdir() if path.name != _JOURNAL]
        if (others or text) and not isinstance(known, str):
            raise self._not_ours()
        for path in others:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
        self._journal.truncate(0)
        self._write([{"fingerprint": fingerprint}])

    def _write(self, lines: list[dict[str, Any]]) -> None:
        self._journal.writelines(json.dumps(line) + "\n" for line in lines)
        self._journal.flush()
        os.fdatasync(self._journal.fileno())


def partial_of(output: Path) -> Path:
    """Where `output` lies before it has its name."""
    output = output.resolve()  # `.` has none
    return output.with_name(output.name + SUFFIX)


def check_output(output: Path) -> None:
    """Raise unless `output` is free to be written."""
    if os.path.ismount(output):
        raise CheckpointError(f"{output} is where a disk begins; give a directory in it")
    if output.is_dir() and not any(output.iterdir()):
        return
    if output.exists() or output.is_symlink():
        raise CheckpointError(
            f"{output} is there already, and nothing is overwritten; give another name or remove it"
        )


def _whole_lines(text: str) -> Iterator[dict[str, Any]]:
    """The lines up to one that was cut off."""
    for line in text.splitlines():
        try:
            yield json_object(line.encode())
        except ValueError:
            return


def _is_entry(line: Mapping[str, Any]) -> bool:
    """Whether it is a line that was written for a tensor."""
    return {field: type(value) for field, value in line.items()} == _FIELDS


def _write_at(fd: int, data: bytes, *, end: int, digest: Digest) -> None:
    """Write the few bytes before `end`."""
    if data:
        write_all(fd, data, end - len(data))
        digest.update(data)
