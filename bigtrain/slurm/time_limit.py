"""A job's time limit: as sbatch is told of it, and as Slurm knows it while the job runs."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping

from bigtrain.cluster.time_limit import TimeLimit, lead_s
from bigtrain.errors import LaunchError
from bigtrain.slurm import client

_DAYS = re.compile(r"(\d+)-(\d+)(?::(\d+))?(?::(\d+))?")
_STAMP = "%Y-%m-%dT%H:%M:%S"
_LARGEST_SIGNAL_S = 65_535
"""What sbatch takes behind the @ of --signal."""


def signal_lead_s(last_save_s: float | None, time_limit: str | None) -> int:
    """Of the notice that Slurm itself gives; a run whose saves have become longer gives its own."""
    return min(_LARGEST_SIGNAL_S, lead_s(last_save_s, limit_s=seconds_of(time_limit)))


def seconds_of(text: str | None) -> float | None:
    """`24:00:00`, `90`, `1-12` in seconds; None where it is no limit, or not known."""
    if text is None:
        return None
    if match := _DAYS.fullmatch(text):
        days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
        return float(((days * 24 + hours) * 60 + minutes) * 60 + seconds)
    parts = text.split(":")
    if not all(part.isdecimal() for part in parts) or len(parts) > 3:
        return None
    numbers = [int(part) for part in parts]
    if len(numbers) == 3:
        return float((numbers[0] * 60 + numbers[1]) * 60 + numbers[2])
    return float(numbers[0] * 60 + (numbers[1] if len(numbers) == 2 else 0))


def of_job(environment: Mapping[str, str]) -> TimeLimit | None:
    """The limit of the job that this process is part of, as it is now; None where it has none, or
    where Slurm does not tell."""
    job_id = environment.get("SLURM_JOB_ID", "")
    if not job_id.isdigit():
        return None
    try:
        text = client.call(["squeue", "--noheader", "--format=%A|%S|%e", f"--jobs={job_id}"])
        starts, ends = _row_of(job_id, text)
        return TimeLimit(starts=_read_stamp(starts), ends=_read_stamp(ends))
    except (LaunchError, ValueError, OverflowError):
        return _of_variables(environment)


def _row_of(job_id: str, text: str) -> list[str]:
    """Start and end: a number that is an array's too is answered with all of the array's jobs.
    ValueError where none of them is this one."""
    for number, *times in (line.strip().split("|") for line in text.splitlines()):
        if number == job_id and len(times) == 2:
            return times
    raise ValueError(f"squeue does not tell of job {job_id}")


def _of_variables(environment: Mapping[str, str]) -> TimeLimit | None:
    """Of releases after 22.05; in a container there is no squeue."""
    starts = environment.get("SLURM_JOB_START_TIME", "")
    ends = environment.get("SLURM_JOB_END_TIME", "")
    if not (starts.isdigit() and ends.isdigit()):
        return None
    return TimeLimit(starts=float(starts), ends=float(ends))


def _read_stamp(text: str) -> float:
    return time.mktime(time.strptime(text, _STAMP))
