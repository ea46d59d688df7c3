"""`bigtrain logs`, by every way to name a run."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from bigtrain.cli import app
from bigtrain.errors import ConfigError
from bigtrain.log_time import stamp
from bigtrain.plan import RunPlan, write_plan
from bigtrain.run_commands import _output_dir
from bigtrain.slurm.record import SubmissionRecord, remember
from bigtrain.topology import Topology
from bigtrain.translate.config import EngineConfig, SingleSettings


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return tmp_path


def _run(folder: Path, place: str) -> None:
    logs = folder / place / "logs" / "attempt-01" / "node-000-node0"
    logs.mkdir(parents=True)
    (logs / "rank-00000.log").write_text("2026-01-31 12:00:00,000 hello\n")


def test_a_local_run_is_found_by_its_name_its_directory_and_its_run_file(folder: Path) -> None:
    _run(folder, "runs/tiny")
    (folder / "tiny.yaml").write_text("model: {config: {model_type: llama}}\n")
    for named in ("tiny", "runs/tiny", "tiny.yaml"):
        done = CliRunner().invoke(app, ["logs", named])
        assert done.output == "[node0:0] 2026-01-31 12:00:00,000 hello\n"


def test_a_script_is_found_by_its_file_and_by_where_it_writes_itself(folder: Path) -> None:
    _run(folder, "runs/mine")
    (folder / "mine.py").touch()
    for attempt, place in enumerate(("own/a", "own/b"), 1):
        plan = RunPlan(
            name="mine",
            kind="script",
            source=str(folder / "mine.py"),
            script_args=("--lr", "1", "--output_dir", place),
            working_dir=str(folder),
            topology=Topology(),
            device="cpu",
            engine=EngineConfig(name="single", settings=SingleSettings()),
            output_dir=str(folder / "runs/mine"),
            attempt=attempt,
        )
        write_plan(plan, folder / f"runs/mine/plans/attempt-{attempt:02d}.json")
        (folder / place).mkdir(parents=True)
    for named in ("mine.py", "own/a"):
        done = CliRunner().invoke(app, ["logs", named])
        assert done.output == "[node0:0] 2026-01-31 12:00:00,000 hello\n"
    newer = CliRunner().invoke(app, ["logs", "own/b"]).exception
    assert str(newer) == "runs/mine has no logs of that attempt; there are attempt-01"


def test_a_rank_without_a_log_is_told_which_have_one(folder: Path) -> None:
    _run(folder, "runs/tiny")
    error = CliRunner().invoke(app, ["logs", "tiny", "--rank", "9"]).exception
    assert str(error).endswith("has no log of that rank or node; there is rank 0 on node0")


@pytest.mark.parametrize("command", [["jobs"], ["inspect", "nowhere"], ["consolidate", "a", "b"]])
def test_every_command_with_json_tells_of_a_fault_there(
    folder: Path, command: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(folder))
    done = CliRunner().invoke(app, [*command, "--json"])
    told = json.loads(done.stdout)
    assert (told["kind"], told["text"][:7], done.stderr) == ("failure", "error: ", "")
    assert done.exit_code in (4, 5)


def test_slurm_without_a_cluster_is_one_message_with_what_to_do(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = "squeue: fatal: Could not establish a configuration source"
    (folder / "squeue").write_text(f"#!/bin/sh\necho '{said}' >&2\nexit 1\n")
    (folder / "squeue").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    assert str(CliRunner().invoke(app, ["jobs"]).exception) == (
        "squeue finds no cluster from this machine (it has no slurm.conf, and DNS names no "
        "controller); run this on a login node of the cluster, or set SLURM_CONF to its slurm.conf"
    )


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("output_dir: elsewhere", "elsewhere"),
        ("training: {output_dir: elsewhere}", "elsewhere"),
        ("output_dir: ~/elsewhere", "home/elsewhere"),
        ("training: 3", "runs/run"),
    ],
)
def test_a_run_file_with_a_directory_of_its_own_leads_there(
    folder: Path, monkeypatch: pytest.MonkeyPatch, text: str, place: str
) -> None:
    monkeypatch.setenv("HOME", str(folder / "home"))
    (folder / "run.yaml").write_text(f"{text}\n")
    assert folder / _output_dir("run.yaml") == folder / place


def test_a_home_directory_that_is_not_there_is_named(folder: Path) -> None:
    (folder / "run.yaml").write_text("output_dir: ~nobody-here/x\n")
    with pytest.raises(ConfigError, match=r"^run\.yaml: output_dir: ~nobody-here/x: there is no"):
        _output_dir("run.yaml")


def test_a_sweep_is_asked_which_of_its_runs_is_meant(folder: Path) -> None:
    places = [str(folder / f"seed={k}") for k in (1, 2)]
    record = SubmissionRecord(
        name="tiny",
        output_dir=places[0],
        script="job.sbatch",
        script_sha256="",
        source="run.yaml",
        source_sha256="",
        code=None,
        snapshot=None,
        nodes=1,
        submitted=time.time(),
        job_id="12",
        sweep=(("tiny/seed=1", places[0]), ("tiny/seed=2", places[1])),
    )
    record.write(folder / "attempt-01.json")
    assert json.loads((folder / "attempt-01.json").read_text())["sweep"][1][1] == places[1]
    remember(record, folder / "attempt-01.json", environment={"XDG_STATE_HOME": "state"})
    assert _output_dir("12_1") == Path(places[1])
    assert _output_dir("tiny/seed=1") == Path(places[0])
    with pytest.raises(ConfigError, match=r"12 is a sweep; .* 12_0 \(tiny/seed=1\), 12_1"):
        _output_dir("12")


def test_what_is_no_run_is_refused_with_all_that_was_looked_for() -> None:
    with pytest.raises(ConfigError, match="nothing is neither a run file, nor a script, nor"):
        _output_dir("nothing")


def test_a_run_is_followed_from_a_time_on_with_all_that_comes(folder: Path) -> None:
    _run(folder, "runs/tiny")
    logs = folder / "runs/tiny/logs/attempt-01/node-000-node0"
    command = [sys.executable, "-m", "bigtrain", "logs", "tiny", "--follow", "--since", "10m"]
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(folder), "TZ": "Asia/Tokyo"}
    reading = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    assert reading.stdout is not None
    try:
        with (logs / "rank-00000.log").open("a") as file:
            file.write(f"{stamp(time.time())} INFO x: now\n")
        assert reading.stdout.readline().endswith("INFO x: now\n")
        with (logs / "rank-00000.log").open("a") as file:
            file.write(f"{stamp(time.time())} INFO x: later\n")
        assert reading.stdout.readline().endswith("INFO x: later\n")
    finally:
        reading.kill()
        reading.communicate()
