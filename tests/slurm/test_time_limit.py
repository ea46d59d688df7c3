from __future__ import annotations

import time
from pathlib import Path

import pytest

from bigtrain.cluster.time_limit import TimeLimit
from bigtrain.slurm.time_limit import of_job

ROWS = """\
5001|2026-01-02T00:00:00|2026-01-02T01:00:00
5000|2026-01-03T00:00:00|2026-01-03T02:00:00
"""


def _seconds(day: int, hour: int) -> float:
    return time.mktime((2026, 1, day, hour, 0, 0, 0, 0, -1))


@pytest.mark.parametrize(
    ("job_id", "limit"),
    [
        ("5000", TimeLimit(starts=_seconds(3, 0), ends=_seconds(3, 2))),
        ("5001", TimeLimit(starts=_seconds(2, 0), ends=_seconds(2, 1))),
        ("5002", None),
    ],
)
def test_of_all_jobs_of_an_array_the_limit_is_this_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, job_id: str, limit: TimeLimit | None
) -> None:
    (tmp_path / "squeue").write_text(f"#!/bin/bash\ncat <<'EOF'\n{ROWS}EOF\n")
    (tmp_path / "squeue").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert of_job({"SLURM_JOB_ID": job_id}) == limit
