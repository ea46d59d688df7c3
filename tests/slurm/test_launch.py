"""`bigtrain launch` for several machines, as far as that needs no cluster."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

GOLDEN = Path(__file__).with_name("golden")
RUN = """\
name: tiny
model:
  config: {model_type: llama, hidden_size: 64}
tokenizer: {kind: bytes}
data: {name: builtin:python-docs, sequence_length: 128}
engine: fsdp
cluster:
  procs_per_node: 8
  slurm:
    partition: gpu
    time: 24:00:00
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "run.yaml").write_text(RUN)
    return tmp_path


def _launch(folder: Path, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "bigtrain", "launch", "run.yaml", *words],
        cwd=folder,
        env={"PATH": "/usr/bin:/bin", "HOME": str(folder), **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def _options(script: str) -> list[str]:
    return [line.split("#SBATCH ")[1] for line in script.splitlines() if line[:7] == "#SBATCH"]


def test_a_dry_run_prints_the_batch_script_and_writes_nothing(folder: Path) -> None:
    done = _launch(folder, "--slurm", "--nodes", "4", "--dry-run", "--sbatch", "qos=high")

    assert done.returncode == 0, done.stderr
    options = _options(done.stdout)
    assert options == [
        "--job-name=tiny",
        "--nodes=4",
        "--ntasks-per-node=1",
        "--gpus-per-node=8",
        f"--output={folder}/runs/tiny/slurm-%j.out",
        "--open-mode=append",
        "--requeue",
        "--signal=USR2@120",
        "--export=ALL",
        "--partition=gpu",
        "--time=24:00:00",
        "--qos=high",
    ]
    assert "engine.name" in done.stderr
    assert "Memory" in done.stderr
    assert sorted(path.name for path in folder.iterdir()) == ["run.yaml"]


def test_a_dry_run_by_hand_shows_the_command_of_every_node(folder: Path) -> None:
    done = _launch(folder, "--nodes", "4", "--procs-per-node", "2", "--dry-run")

    assert done.returncode == 0, done.stderr
    line = next(line for line in done.stdout.splitlines() if "on each of 4 nodes" in line)
    assert line.endswith("--nodes 4 --node-rank K --rdzv-endpoint HOST:PORT")
    assert "--set cluster.procs_per_node=2" in line


def test_flags_win_over_the_run_file_in_any_spelling(folder: Path) -> None:
    flags = ["--time", "1:00", "--sbatch", "p=debug", "--sbatch", "--cpus-per-gpu=4"]
    flags += ["--signal", "USR2@300", "--max-requeues", "3", "--container-image", "a/b.sqsh"]

    done = _launch(folder, "--slurm", "--dry-run", *flags)

    options = _options(done.stdout)
    assert [o for o in options if o.startswith(("--time", "--part", "--signal", "--cpus"))] == [
        "--signal=USR2@300",
        "--time=1:00",
        "--partition=debug",
        "--cpus-per-gpu=4",
    ]
    assert "max_requeues=3\n" in done.stdout
    assert "  --container-image=a/b.sqsh\n" in done.stdout


def test_a_sweep_is_an_array_with_a_plan_for_every_combination(folder: Path) -> None:
    axes = ["--sweep", "training.learning_rate=1e-4,3e-4", "--sweep", "training.seed=1,2"]

    done = _launch(folder, "--slurm", "--dry-run", *axes)

    assert done.returncode == 0, done.stderr
    assert "--array=0-3" in _options(done.stdout)
    assert "runs/tiny/learning_rate=0.0003,seed=2/plans/attempt-01.json" in done.stdout


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (
            ["--slurm", "--sbatch", "partiton=gpu"],
            "flag --sbatch: cluster.slurm.partiton: sbatch has no such option; "
            "did you mean 'partition'?",
        ),
        (
            ["--slurm", "--engine", "auto", "--sbatch", "qoss=high"],
            "flag --sbatch: cluster.slurm.qoss: sbatch has no such option; did you mean 'qos'?",
        ),
        (
            ["--slurm", "--set", "cluster.slurm.qoss=high"],
            "--set: cluster.slurm.qoss: sbatch has no such option; did you mean 'qos'?",
        ),
        (
            ["--slurm", "--set", "cluster.procs_per_node=null"],
            "cluster.procs_per_node: say how many processes each node runs (--procs-per-node 8), "
            "or how many GPUs it is to have (cluster.slurm.gpus_per_node)",
        ),
        (
            ["--slurm", "--set", "cluster.slurm.setup=export HF_TOKEN=hf_abc"],
            "--set: cluster.slurm.setup: HF_TOKEN: a secret's value must not be written into a "
            "plan; export it where bigtrain is started, and every rank inherits it",
        ),
        (
            ["--slurm", "--sbatch", "gpus-per-node=4"],
            "8 processes on each node need 8 GPUs, and cluster.slurm asks for 4; use "
            "--procs-per-node 4",
        ),
        (
            ["--snapshot"],
            "flag --snapshot: it is for a Slurm job; add --slurm, or leave it out",
        ),
        (
            ["--nodes", "2", "--procs-per-node", "1"],
            "the run is for 2 nodes, and this machine is one; add --slurm to submit it, or start "
            "it on each machine with --node-rank K --rdzv-endpoint HOST:PORT",
        ),
        (
            ["--nodes", "two"],
            "flag --nodes: 'two' is not a whole number from 1 on",
        ),
        (
            ["--node-rank", "0"],
            "--nodes N, --node-rank K and --rdzv-endpoint HOST:PORT go together: the same N and "
            "endpoint on each machine, K from 0 on, and HOST the machine of --node-rank 0",
        ),
        (
            ["--nodes", "2", "--node-rank", "0", "--rdzv-endpoint", "node1"],
            "flag --rdzv-endpoint: 'node1' is not HOST:PORT, as in node1:29400",
        ),
        (
            ["--nodes", "²"],
            "flag --nodes: '²' is not a whole number from 1 on",
        ),
        (
            ["--nodes", "²:4", "--rdzv-endpoint", "h:29400"],
            "flag --nodes: '²:4' is not a range of numbers, as in 2:4",
        ),
        (
            ["--nodes", "2", "--node-rank", "0", "--rdzv-endpoint", "h:²"],
            "flag --rdzv-endpoint: 'h:²' is not HOST:PORT, as in node1:29400",
        ),
        (
            ["--nodes", "2", "--node-rank", "0", "--rdzv-endpoint", "http://h:29400", "--dry-run"],
            "flag --rdzv-endpoint: 'http://h:29400' is not HOST:PORT, as in node1:29400",
        ),
        (
            ["--nodes", "2:4"],
            "flag --nodes 2:4: an elastic run needs --rdzv-endpoint HOST:PORT, the same on every "
            "machine, and no --node-rank: ranks are given out as machines come",
        ),
    ],
)
def test_what_cannot_be_is_refused_with_the_way_out(
    folder: Path, words: list[str], text: str
) -> None:
    done = _launch(folder, *words)

    assert (done.returncode, done.stderr) == (2, f"error: {text}\n")
    assert not (folder / "runs").exists()


def test_without_slurm_a_submission_says_where_it_can_be_made(folder: Path) -> None:
    done = _launch(folder, "--slurm", PATH=str(folder))

    assert done.returncode == 5
    assert "sbatch was not found on this machine" in done.stderr


def test_what_sbatch_refuses_leaves_no_attempt(folder: Path) -> None:
    programs = folder / "bin"
    programs.mkdir()
    for name, text in {"sbatch": "echo no such partition >&2; exit 1", "sinfo": "exit 1"}.items():
        (programs / name).write_text(f"#!/bin/sh\n{text}\n")
        (programs / name).chmod(0o755)

    done = _launch(folder, "--slurm", PATH=f"{programs}:/usr/bin:/bin")

    assert done.returncode == 5
    assert "sbatch failed with exit code 1\n  no such partition" in done.stderr
    assert [path for path in (folder / "runs").rglob("*") if path.is_file()] == []


def test_a_spare_node_could_not_go_on_from_disks_that_are_not_shared(folder: Path) -> None:
    words = ["--slurm", "--sbatch", "spare_nodes=1", "--set", "training.save_on_each_node=true"]

    done = _launch(folder, *words, "--dry-run")

    assert done.returncode == 2
    assert "a spare node has no part of a checkpoint that each node keeps" in done.stderr


def test_a_task_that_does_not_see_its_plan_says_what_must_be_shared(folder: Path) -> None:
    done = subprocess.run(
        [
            *(sys.executable, "-c", "from bigtrain.slurm.node import main; main()"),
            "/local/plans/attempt-01.json",
        ],
        env={"PATH": "/usr/bin:/bin", "HOME": str(folder), "SLURMD_NODENAME": "node7"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )

    assert done.returncode == 5
    assert "node7 has no /local/plans/attempt-01.json: a submitted run's output_dir" in done.stderr


def test_a_shell_on_a_node_of_the_job_is_told_of_srun(folder: Path) -> None:
    words = ["--nodes", "2", "--procs-per-node", "1"]

    done = _launch(folder, *words, SLURM_JOB_ID="7")

    assert "start it with srun --ntasks-per-node=1 bigtrain launch" in done.stderr


def test_the_notice_leaves_time_for_two_saves_as_long_as_the_last_one(folder: Path) -> None:
    checkpoint = folder / "runs" / "tiny" / "checkpoint-5"
    (checkpoint / "weights").mkdir(parents=True)
    for name, written in (("weights/a", 1000), ("config.json", 1100), ("manifest.json", 1300)):
        (checkpoint / name).write_text("{}")
        os.utime(checkpoint / name, (written, written))

    done = _launch(folder, "--slurm", "--dry-run", "--set", "training.overwrite_output_dir=true")

    assert "--signal=USR2@600" in _options(done.stdout), done.stderr


SQUEUE = """\
#!/bin/bash
echo "7|$(date --date='-1 hour' +%FT%T)|$(date --date='+60 seconds' +%FT%T)"
"""
LEAVES = """\
import signal, sys, time
signal.signal(signal.SIGUSR2, lambda number, frame: sys.exit(85))
time.sleep(60)
"""


def test_a_run_on_one_node_of_a_job_is_told_of_the_time_limit_and_goes_on_in_the_next_start(
    folder: Path,
) -> None:
    (folder / "squeue").write_text(SQUEUE)
    (folder / "squeue").chmod(0o755)
    (folder / "train.py").write_text(LEAVES)
    job = {"PATH": f"{folder}:/usr/bin:/bin", "SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "1"}
    command = ("launch", "train.py", "--procs-per-node", "1", "--resume", "never")
    done = subprocess.run(
        [sys.executable, "-m", "bigtrain", *command],
        cwd=folder,
        env={"HOME": str(folder), **job},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 85, done.stderr
    assert re.search(r"the time limit is \d+ s away: saving\n", done.stderr), done.stderr
    (plan,) = (folder / "runs" / "train" / "plans").iterdir()
    assert json.loads(plan.read_text())["resume"] == "auto"
