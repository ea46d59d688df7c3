"""This user's runs in Slurm: their state, how far they have come, and their end."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bigtrain.errors import LaunchError
from bigtrain.slurm import client
from bigtrain.slurm.record import SubmittedRun, remembered

_TAIL_BYTES = 65_536
_INDICES = re.compile(r"(\d+)(?:-(\d+)(?::([1-9]\d*))?)?", re.ASCII)


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

    With `ended` also those that have left it, as far as they are remembered. Of a sweep, each run
    is one.
    """
    runs = [(record, run) for record in remembered(environment=environment) for run in record.runs]
    queue = _queue()
    known = [(record, run) for record, run in runs if ended or run.job_id in queue]
    gone = dict.fromkeys(record.job_id for record, run in known if run.job_id not in queue)
    states = queue | _ended_states([job_id for job_id in gone if job_id])
    return [_job(run, record.nodes, states) for record, run in known]


@dataclass(frozen=True, kw_only=True)
class Found:
    """A job that was asked for: a run, or a whole sweep."""

    job_id: str
    """Of one run of an array's, with its index."""
    cluster: str | None
    runs: list[SubmittedRun]


def find_jobs(target: str, *, environment: Mapping[str, str]) -> list[Found]:
    """The jobs that a job's number, a run's name or its output directory means, newest first.

    LaunchError where there is none.
    """
    directory = os.path.realpath(target)
    found = []
    for record in remembered(environment=environment):
        for run in record.runs:
            is_place = directory == os.path.realpath(run.output_dir)
            if target in (run.job_id, run.name) or is_place:
                found.append(Found(job_id=run.job_id, cluster=record.cluster, runs=[run]))
                break
        else:
            places = [os.path.realpath(run.output_dir) for run in record.runs]
            is_place = directory == os.path.commonpath(places)  # above a sweep's runs
            if target in (record.job_id, record.name) or is_place:
                found.append(
                    Found(job_id=record.job_id or "", cluster=record.cluster, runs=record.runs)
                )
    if found:
        return found
    raise LaunchError(
        f"{target} is no job, run or output directory that bigtrain submitted; bigtrain jobs lists "
        "them, and scancel ends any other job"
    )


def cancel(target: str, *, environment: Mapping[str, str]) -> str:
    """End a job for good; returns its number. Its ranks save first, within Slurm's KillWait.

    LaunchError where `target` means none that has not ended, or several.
    """
    found = find_jobs(target, environment=environment)
    if len(found) > 1 or found[0].cluster is None:  # the queue of another one is not asked for
        queue = _queue()
        found = [job for job in found if any(run.job_id in queue for run in job.runs)]
        if len(found) != 1:
            raise LaunchError(_say_which(target, found))
    (job,) = found
    elsewhere = [f"--clusters={job.cluster}"] if job.cluster else []
    client.call(["scancel", *elsewhere, job.job_id])
    return job.job_id


def _say_which(target: str, found: Sequence[Found]) -> str:
    if not found:
        return f"no job of {target} is in the queue; all have ended"
    numbers = ", ".join(f"{job.job_id} ({job.runs[0].output_dir})" for job in found)
    return f"{target} means several jobs; say which by its number: {numbers}"


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
    return _rows_of(
        client.call(["squeue", "--me", "--array", "--noheader", "--format=%i|%T|%M|%r"])
    )


def _ended_states(ids: Sequence[str]) -> dict[str, _Row]:
    """From the accounting where there is one, else from what the controller still remembers."""
    if not ids:
        return {}
    columns = "--format=JobID,State,Elapsed,Reason"
    try:
        text = client.call(["sacct", "-X", "-n", "-P", f"--jobs={','.join(ids)}", columns])
    except LaunchError:
        return {key: row for job_id in ids[:20] for key, row in _remembered_states(job_id)}
    return _rows_of(text)


def _remembered_states(job_id: str) -> Iterator[tuple[str, _Row]]:
    """A line for each job of an array."""
    try:
        text = client.call(["scontrol", "show", "job", "--oneliner", job_id])
    except LaunchError:
        return
    for line in text.splitlines():
        values = dict(word.split("=", 1) for word in line.split() if "=" in word)
        index = values.get("ArrayTaskId")
        state, elapsed = values.get("JobState", ""), values.get("RunTime", "")
        row = _Row(state=state, elapsed=elapsed, reason="")
        for name in _names_of(job_id if index is None else f"{job_id}_[{index}]"):
            yield name, row


def _rows_of(text: str) -> dict[str, _Row]:
    rows: dict[str, _Row] = {}
    for line in text.splitlines():
        job_id, state, elapsed, reason = [*line.split("|", 3), "", "", ""][:4]
        reason = "" if reason == "None" else reason
        # `CANCELLED by 1000` in the accounting.
        row = _Row(state=state.split(" ")[0], elapsed=elapsed, reason=reason)
        rows |= dict.fromkeys(_names_of(job_id), row)
    return rows


def _names_of(job_id: str) -> list[str]:
    """One for each task of an array: those that never started share a line, `12_[0,2-8:2%1]`."""
    array, bracket, tasks = job_id.partition("_[")
    return [f"{array}_{index}" for index in _indices(tasks)] if bracket else [job_id]


def _indices(text: str) -> Iterator[int]:
    for part in re.split(r"[%\]]", text)[0].split(","):
        if found := _INDICES.fullmatch(part):  # Slurm cuts off a long list, with ...
            yield from range(int(found[1]), int(found[2] or found[1]) + 1, int(found[3] or 1))


def _job(run: SubmittedRun, nodes: int, states: Mapping[str, _Row]) -> Job:
    row = states.get(run.job_id) or _Row(state="GONE", elapsed="", reason="")
    return Job(
        job_id=run.job_id,
        name=run.name,
        state=row.state,
        reason=row.reason,
        elapsed=row.elapsed,
        nodes=nodes,
        output_dir=run.output_dir,
        last_step=last_step(Path(run.output_dir)),
    )


def _tail(path: Path) -> list[bytes]:
    try:
        with path.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL_BYTES))
            return file.read().splitlines()
    except OSError:
        return []
