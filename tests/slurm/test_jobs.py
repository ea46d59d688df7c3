"""Which job is meant, and which one is ended: with a `scancel` that only notes its words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from bigtrain.cli import app
from bigtrain.errors import LaunchError
from bigtrain.slurm.jobs import cancel, list_jobs
from bigtrain.slurm.record import SubmissionRecord, remember

CONTENT: dict[str, Any] = {
    "name": "tiny",
    "output_dir": "runs/tiny",
    "script": "s",
    "script_sha256": "",
    "source": "run.yaml",
    "source_sha256": "",
    "code": None,
    "snapshot": None,
    "nodes": 1,
    "submitted": 0.0,
    "job_id": "12",
}


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, text in {
        "scancel": f'echo "$@" >>{tmp_path}/scancel.log',
        "squeue": f"cat {tmp_path}/queue",
        "sacct": "exit 1",
        "scontrol": "exit 1",
    }.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    (tmp_path / "queue").touch()
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def _submitted(home: Path, number: str, **content: Any) -> Path:
    """The record of a job in this user's list, with anything in it."""
    path = home / f"record-{number}.json"
    record = SubmissionRecord(**CONTENT | {"job_id": number})
    remember(record, path, environment={"XDG_STATE_HOME": str(home / "state")})
    path.write_text(json.dumps(CONTENT | {"job_id": number} | content))
    return path


def _environment(home: Path) -> dict[str, str]:
    return {"XDG_STATE_HOME": str(home / "state")}


def _told(home: Path) -> list[str]:
    path = home / "scancel.log"
    return path.read_text().splitlines() if path.exists() else []


@pytest.mark.parametrize(
    "content",
    [
        {"output_dir": 5},
        {"name": ["a"]},
        {"name": "a\x1b[2J"},
        {"job_id": "--user=root"},
        {"job_id": 7},
        {"nodes": "many"},
        {"sweep": 3},
        {"sweep": [["a", 5]]},
        {"code": {"root": 1, "commit": "", "changed": {}}},
        {"cluster": "--user=root"},
        {"more": 1},
    ],
)
def test_a_record_that_others_have_written_to_ends_no_other_job(
    home: Path, content: dict[str, Any]
) -> None:
    _submitted(home, "12", **content)

    assert list_jobs(environment=_environment(home), ended=True) == []
    with pytest.raises(LaunchError, match="12 is no job, run or output directory"):
        cancel("12", environment=_environment(home))
    assert _told(home) == []


def test_the_number_is_the_users_own_whatever_the_record_says(home: Path) -> None:
    _submitted(home, "12", job_id="99")
    (home / "queue").write_text("12|RUNNING|1:00|None\n99|RUNNING|1:00|None\n")
    assert cancel("tiny", environment=_environment(home)) == "12"
    assert _told(home) == ["12"]


def test_a_job_of_another_cluster_is_ended_there(home: Path) -> None:
    _submitted(home, "12", cluster="big")
    cancel("12", environment=_environment(home))
    assert _told(home) == ["--clusters=big 12"]


def test_of_several_jobs_with_a_name_the_one_that_still_runs_is_meant(home: Path) -> None:
    for number in ("12", "13"):
        _submitted(home, number)
    (home / "queue").write_text("12|RUNNING|1:00|None\n99|RUNNING|1:00|None\n")
    assert cancel("tiny", environment=_environment(home)) == "12"
    assert _told(home) == ["12"]


def test_of_several_that_run_none_is_guessed_and_of_none_it_is_said(home: Path) -> None:
    for number in ("12", "13"):
        _submitted(home, number)
    (home / "queue").write_text("12|RUNNING|1:00|None\n13|PENDING|0:00|Priority\n")
    with pytest.raises(LaunchError, match=r"several jobs; .* 13 \(runs/tiny\), 12 \(runs/tiny\)"):
        cancel("tiny", environment=_environment(home))
    (home / "queue").write_text("")
    with pytest.raises(LaunchError, match="no job of tiny is in the queue; all have ended"):
        cancel("tiny", environment=_environment(home))
    assert _told(home) == []


def test_a_job_that_has_ended_is_not_said_to_be_ended(home: Path) -> None:
    _submitted(home, "12")
    (home / "queue").write_text("13|RUNNING|1:00|None\n")
    for target in ("12", "tiny", "runs/tiny"):
        with pytest.raises(
            LaunchError, match=f"no job of {target} is in the queue; all have ended"
        ):
            cancel(target, environment=_environment(home))
    assert _told(home) == []


def test_a_sweep_is_ended_as_a_whole_or_by_run(home: Path) -> None:
    runs = [["tiny/seed=1", "runs/tiny/seed=1"], ["tiny/seed=2", "runs/tiny/seed=2"]]
    _submitted(home, "12", sweep=runs, output_dir="runs/tiny/seed=1")
    (home / "queue").write_text("12_0|RUNNING|1:00|None\n12_1|PENDING|0:00|Priority\n")
    for target in ("tiny/seed=2", "12_0", "tiny", "12", "runs/tiny", f"{home}/runs/tiny/"):
        cancel(target, environment=_environment(home))
    assert _told(home) == ["12_1", "12_0", "12", "12", "12", "12"]
    with pytest.raises(LaunchError, match="runs is no job, run or output directory"):
        cancel("runs", environment=_environment(home))

    (home / "queue").write_text("12_1|RUNNING|1:00|None\n")
    done = CliRunner().invoke(app, ["jobs"])
    assert [line.split()[:3] for line in done.output.splitlines()[1:]] == [
        ["12_1", "tiny/seed=2", "RUNNING"]
    ]


SACCT = """\
12_0|COMPLETED|1:00|None
12_[1,3-5%2]|CANCELLED by 0|0:00|None
12_[2-6:4]|FAILED|0:00|None
12_[7,...]|FAILED|0:00|None
"""
SCONTROL = """\
JobId=13 ArrayJobId=12 ArrayTaskId=0 JobState=COMPLETED RunTime=1:00
JobId=12 ArrayJobId=12 ArrayTaskId=1,3-5%2 JobState=CANCELLED RunTime=0:00
JobId=12 ArrayJobId=12 ArrayTaskId=2-6:4 JobState=FAILED RunTime=0:00
JobId=12 ArrayJobId=12 ArrayTaskId=7,... JobState=FAILED RunTime=0:00
"""


@pytest.mark.parametrize(("program", "text"), [("sacct", SACCT), ("scontrol", SCONTROL)])
def test_runs_of_a_sweep_that_never_started_are_told_apart(
    home: Path, program: str, text: str
) -> None:
    runs = [[f"tiny/seed={k}", f"runs/tiny/seed={k}"] for k in range(9)]
    _submitted(home, "12", sweep=runs)
    (home / program).write_text(f"#!/bin/bash\ncat <<END\n{text}END\n")

    found = list_jobs(environment=_environment(home), ended=True)

    cancelled, failed = "CANCELLED", "FAILED"
    states = ["COMPLETED", cancelled, failed, cancelled, cancelled, cancelled, failed, failed]
    assert [job.state for job in found] == [*states, "GONE"]
