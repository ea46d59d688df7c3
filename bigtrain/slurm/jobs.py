"""This user's runs in Slurm: their state, how far they have come, and their end."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bigtrain.errors import LaunchError
from bigtrain.slurm import client
from bigtrain.slurm.record import SubmissionRecord, remembered

_TAIL_BYTES = 65_536


@dataclass(frozen=True, kw_only=True)
class Job:
    """A submitted run as it stands."""

    job_id: str
    name: str
    state: str
    """Slurm's word (`PENDING`, `RUNNING`, `COMPLETED`, …); `GONE` once Slurm has forgotten it."""
    reason: str
    """Why it waits; empty while it does not."""
    elapsed: str
    nodes: int
    output_dir: str
    last_step: int | None
    """Of the newest attempt; None before the first one that was logged."""


def list_jobs(*, environment: Mapping[str, str], ended: bool = False) -> list[Job]:
    """The runs that this user submitted and that are in the queue, newest first.

    With `ended` also those that have left it, as far as they are remembered.
    """
    records = list(remembered(environment=environment))
    queue = _queue()
    known = [record for record in records if ended or _rows(record, queue)]
    states = queue | _ended_states([r for r in known if not _rows(r, queue)])
    return [_job(record, states) for record in known]


def find_job(target: str, *, environment: Mapping[str, str]) -> SubmissionRecord:
    """The submitted run that a job's number, a run's name or its output directory means.

    Of several with that name or directory the newest. LaunchError where there is none.
    """
    directory = os.path.realpath(target)
    for record in remembered(environment=environment):
        if target in (record.job_id, record.name) or directory == os.path.realpath(
            record.output_dir
        ):
            return record
    raise LaunchError(
        f"{target} is no job, run or output directory that bigtrain submitted; bigtrain jobs lists "
        "them, and scancel ends any other job"
    )


def cancel(target: str, *, environment: Mapping[str, str]) -> str:
    """End a job for good; returns its number. Its ranks save first, within Slurm's KillWait."""
    record = find_job(target, environment=environment)
    if record.job_id is None:
        raise LaunchError(f"{target} was never taken by Slurm")
    client.call(["scancel", record.job_id])
    return record.job_id


def last_step(output_dir: Path) -> int | None:
    """The last step that the newest attempt has logged."""
    logs = sorted(output_dir.glob("logs/attempt-*/node-*/metrics.jsonl"), reverse=True)
    for path in logs:
        for line in reversed(_tail(path)):
            try:
                step = json.loads(line).get("step")
            except (ValueError, AttributeError):
                continue
            if isinstance(step, int):
                return step
    return None


@dataclass(frozen=True, kw_only=True)
class _Row:
    state: str
    elapsed: str
    reason: str


def _queue() -> dict[str, _Row]:
    """Job number (an array's with its index: `12_3`) → its row."""
    return _rows_of(client.call(["squeue", "--me", "--noheader", "--format=%i|%T|%M|%r"]))


def _ended_states(records: Sequence[SubmissionRecord]) -> dict[str, _Row]:
    """From the accounting where there is one, else from what the controller still remembers."""
    ids = [record.job_id for record in records if record.job_id]
    if not ids:
        return {}
    columns = "--format=JobID,State,Elapsed,Reason"
    try:
        text = client.call(["sacct", "-X", "-n", "-P", f"--jobs={','.join(ids)}", columns])
    except LaunchError:
        return {job_id: row for job_id in ids[:20] if (row := _remembered_state(job_id))}
    return _rows_of(text)


def _remembered_state(job_id: str) -> _Row | None:
    try:
        text = client.call(["scontrol", "show", "job", "--oneliner", job_id])
    except LaunchError:
        return None
    values = dict(word.split("=", 1) for word in text.split() if "=" in word)
    return _Row(state=values.get("JobState", ""), elapsed=values.get("RunTime", ""), reason="")


def _rows_of(text: str) -> dict[str, _Row]:
    rows = {}
    for line in text.splitlines():
        job_id, state, elapsed, reason = [*line.split("|", 3), "", "", ""][:4]
        reason = "" if reason == "None" else reason
        # `CANCELLED by 1000` in the accounting.
        rows[job_id] = _Row(state=state.split(" ")[0], elapsed=elapsed, reason=reason)
    return rows


def _rows(record: SubmissionRecord, rows: Mapping[str, _Row]) -> list[_Row]:
    """Of an array there are several: one for each of its jobs that has begun."""
    job_id = record.job_id
    return [row for key, row in rows.items() if key == job_id or key.startswith(f"{job_id}_")]


def _job(record: SubmissionRecord, states: Mapping[str, _Row]) -> Job:
    rows = _rows(record, states) or [_Row(state="GONE", elapsed="", reason="")]
    return Job(
        job_id=record.job_id or "",
        name=record.name,
        state=",".join(dict.fromkeys(row.state for row in rows)),
        reason=rows[0].reason,
        elapsed=rows[0].elapsed,
        nodes=record.nodes,
        output_dir=record.output_dir,
        last_step=last_step(Path(record.output_dir)),
    )


def _tail(path: Path) -> list[bytes]:
    try:
        with path.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL_BYTES))
            return file.read().splitlines()
    except OSError:
        return []
