"""What was submitted, kept with the run; and this user's list of such runs.

    <output_dir>/slurm/attempt-01.sbatch   the script, as sbatch got it
    <output_dir>/slurm/attempt-01.diff     what the code had beyond its commit
    <output_dir>/slurm/attempt-01.json     this record

The list is a directory of small files, one per job, each naming its record: nothing has to be
locked, and a run that was deleted only leaves a name behind.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from bigtrain.slurm.provenance import CodeState

_MOST_REMEMBERED = 500


@dataclass(frozen=True, kw_only=True)
class SubmittedRun:
    """One run in Slurm."""

    job_id: str
    """Of an array's, with its index: `12_3`."""
    name: str
    output_dir: str


@dataclass(frozen=True, kw_only=True)
class SubmissionRecord:
    """One submitted job."""

    name: str
    output_dir: str
    script: str
    script_sha256: str
    source: str
    """The run file or script that was given, and its hash."""
    source_sha256: str
    code: CodeState | None
    """None outside git."""
    snapshot: str | None
    nodes: int
    submitted: float
    """Seconds since the epoch."""
    job_id: str | None = None
    """None until sbatch has given it."""
    cluster: str | None = None
    """Where it is not the one that Slurm's commands ask by themselves."""
    sweep: tuple[tuple[str, str], ...] = ()
    """Name and output directory of each run of an array, in the order of its indices."""

    @property
    def runs(self) -> list[SubmittedRun]:
        """What the job runs: one run, or each of an array's."""
        number = self.job_id or ""
        if not self.sweep:
            return [SubmittedRun(job_id=number, name=self.name, output_dir=self.output_dir)]
        return [
            SubmittedRun(job_id=f"{number}_{index}", name=name, output_dir=place)
            for index, (name, place) in enumerate(self.sweep)
        ]

    @classmethod
    def read(cls, path: Path) -> SubmissionRecord | None:
        """The record in a file; None where there is none that can be read."""
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            code = content.pop("code")
            content["sweep"] = tuple((n, d) for n, d in content.get("sweep", ()))
            return cls(**content, code=CodeState.from_json(code) if code else None)
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
            return None

    def __post_init__(self) -> None:
        texts = [self.name, self.output_dir, self.script, self.source]
        texts += [text for run in self.sweep for text in run]
        if not all(isinstance(text, str) and text.isprintable() for text in texts):
            raise ValueError("names and paths of a record are printable text")
        if not isinstance(self.nodes, int) or not isinstance(self.snapshot, str | None):
            raise TypeError("the record of a job holds values of other types")
        if self.cluster is not None and not re.fullmatch(r"[\w.][\w.-]*", self.cluster):
            raise ValueError(f"{self.cluster!r} is not the name of a cluster")
        if self.job_id is not None and not re.fullmatch(r"\d+", self.job_id, re.ASCII):
            raise ValueError(f"{self.job_id!r} is not the number of a job")

    def write(self, path: Path) -> None:
        """So that a reader sees all of it or what was there before."""
        staged = path.with_name(f".{path.name}.{os.getpid()}")
        text = json.dumps(dataclasses.asdict(self), indent=2)
        staged.write_text(text + "\n", encoding="utf-8", errors="surrogateescape")
        staged.replace(path)


def record_path(output_dir: str | Path, attempt: int) -> Path:
    """Where the record of an attempt lies in its run; the script beside it ends in .sbatch."""
    return Path(output_dir) / "slurm" / f"attempt-{attempt:02d}.json"


def remember(record: SubmissionRecord, path: Path, *, environment: Mapping[str, str]) -> None:
    """Put a job into this user's list; of too many the oldest are forgotten."""
    folder = _list_of_jobs(environment)
    folder.mkdir(parents=True, exist_ok=True)
    entry = folder / f"{record.job_id}.json"
    entry.write_text(json.dumps({"record": str(path), "listed": time.time()}), encoding="utf-8")
    for old in _newest_first(folder)[_MOST_REMEMBERED:]:
        old.unlink(missing_ok=True)


def remembered(*, environment: Mapping[str, str]) -> Iterator[SubmissionRecord]:
    """The records of this user's jobs that can still be read, newest first.

    The number is the list's own: others may be able to write where the record lies.
    """
    for entry in _newest_first(_list_of_jobs(environment)):
        try:
            path = Path(json.loads(entry.read_text(encoding="utf-8"))["record"])
        except (OSError, ValueError, KeyError, TypeError):
            continue
        record = SubmissionRecord.read(path)
        if record is not None and re.fullmatch(r"\d+", entry.stem, re.ASCII):
            yield dataclasses.replace(record, job_id=entry.stem)


def _list_of_jobs(environment: Mapping[str, str]) -> Path:
    home = environment.get("XDG_STATE_HOME") or str(Path.home() / ".local" / "state")
    return Path(home) / "bigtrain" / "jobs"


def _newest_first(folder: Path) -> list[Path]:
    entries = []
    for path in folder.glob("*.json"):
        with contextlib.suppress(FileNotFoundError):  # another submission has just forgotten it
            entries.append((path.stat().st_mtime_ns, path))
    return [path for _, path in sorted(entries, reverse=True)]
