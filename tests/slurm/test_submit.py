"""Submitting, with an `sbatch` of the real shape that only notes what it was told."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

RUN = """\
name: tiny
model:
  config: {model_type: llama, hidden_size: 64}
tokenizer: {kind: bytes}
data: {name: builtin:python-docs, sequence_length: 128}
engine: ddp
cluster:
  procs_per_node: 2
  slurm: {time: 1-00}
training: {use_cpu: true}
"""
SBATCH = """\
#!/bin/bash
echo "$@" >>"$HOME/sbatch.log"
test ! -e "$HOME/refuse" || { echo "sbatch: error: no" >&2; exit 1; }
n=$(wc -l <"$HOME/sbatch.log")
echo $((122 + n))
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A work tree with a run file and, on its PATH, Slurm's commands."""
    work = tmp_path / "work"
    work.mkdir()
    (work / "run.yaml").write_text(RUN)
    _command(tmp_path, "sbatch", SBATCH)
    return work


def _command(home: Path, name: str, text: str) -> None:
    path = home / "bin" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


def _launch(
    folder: Path, *words: str, target: str = "run.yaml", **environment: str
) -> subprocess.CompletedProcess[str]:
    home = folder.parent
    return subprocess.run(
        [sys.executable, "-m", "bigtrain", "launch", target, *words],
        cwd=folder,
        env={"PATH": f"{home}/bin:/usr/bin:/bin", "HOME": str(home), **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def _git(folder: Path, *words: str) -> None:
    config = ["-c", "user.name=n", "-c", "user.email=e@x", "-c", "protocol.file.allow=always"]
    subprocess.run(["git", *config, *words], cwd=folder, check=True, capture_output=True)


def _committed(folder: Path) -> None:
    _git(folder, "init", "-q")
    _git(folder, "add", ".")
    _git(folder, "commit", "-q", "-m", "first")


@pytest.mark.parametrize("torn", ["\n", "\r", "\x0b", "\x85", "\u2028"])
def test_no_line_break_gets_into_the_batch_script(folder: Path, torn: str) -> None:
    name = json.dumps(f"a{torn}touch PWN")

    done = _launch(folder, "--slurm", "--dry-run", "--set", f"name={name}")
    assert done.returncode == 2
    assert "name: 'a" in done.stderr
    assert "can't be written in one line of a batch script" in done.stderr

    done = _launch(folder, "--slurm", "--output-dir", f"x{torn}touch PWN")
    assert done.returncode == 2
    assert "output_dir: " in done.stderr
    assert sorted(path.name for path in folder.iterdir()) == ["run.yaml"]
    assert not (folder.parent / "sbatch.log").exists()


@pytest.mark.parametrize(
    ("words", "environment", "command"),
    [
        ([], {}, "RANK=0"),
        (["--slurm"], {}, "#SBATCH --job-name=tiny"),
        (
            ["--nodes", "1:2", "--rdzv-endpoint", "localhost:29444"],
            {},
            "-m torch.distributed.run --nnodes 1:2 --nproc-per-node 2",
        ),
        (["--nodes", "2", "--node-rank", "0", "--rdzv-endpoint", "localhost:29444"], {}, "RANK=0"),
        (
            [],
            {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NUM_NODES": "1"},
            "-m bigtrain.worker run.yaml",
        ),
        (
            [],
            {
                "SLURM_PROCID": "0",
                "SLURM_STEP_NUM_TASKS": "2",
                "SLURM_STEP_NUM_NODES": "2",
                "SLURM_NODEID": "0",
                "SLURM_STEP_NODELIST": "node[0-1]",
            },
            "RANK=0",
        ),
    ],
)
def test_a_dry_run_starts_nothing_on_whatever_way(
    folder: Path, words: list[str], environment: dict[str, str], command: str
) -> None:
    step = {"SLURM_STEP_ID": "0", "SLURM_JOB_ID": "7"} if environment else {}

    done = _launch(folder, "--dry-run", *words, **step, **environment)

    assert done.returncode == 0, done.stderr
    assert command in done.stdout
    assert sorted(path.name for path in folder.iterdir()) == ["run.yaml"]


def test_a_sweep_over_options_of_sbatch_is_refused_before_anything_is_written(
    folder: Path,
) -> None:
    for more in ([], ["--dry-run"]):
        done = _launch(folder, "--slurm", "--sweep", "cluster.slurm.partition=a,b", *more)
        assert done.returncode == 2
        assert "cluster.slurm.partition: a sweep is one job array" in done.stderr
    assert sorted(path.name for path in folder.iterdir()) == ["run.yaml"]


def test_a_job_that_slurm_has_taken_is_told_though_it_can_not_be_listed(folder: Path) -> None:
    state = folder.parent / "state"
    state.write_text("a file where a directory should be")

    done = _launch(folder, "--slurm", XDG_STATE_HOME=str(state))

    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("job 123, ")
    assert "bigtrain jobs and cancel will not know the job" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_job_that_slurm_did_not_take_leaves_nothing(folder: Path) -> None:
    (folder.parent / "refuse").touch()
    _committed(folder)

    done = _launch(folder, "--slurm", "--snapshot")

    assert done.returncode == 5
    assert "sbatch: error: no" in done.stderr
    assert not (folder / "runs" / "tiny").exists()


def test_words_of_slurm_s_in_another_encoding_are_told_and_leave_nothing(folder: Path) -> None:
    _command(folder.parent, "sbatch", "#!/bin/bash\nprintf 'no caf\\xe9 today\\n' >&2; exit 1\n")

    done = _launch(folder, "--slurm")

    assert done.returncode == 5
    assert "sbatch failed with exit code 1\n  no caf\ufffd today\n" in done.stderr
    assert not (folder / "runs" / "tiny").exists()


def test_a_directory_that_can_not_be_written_to_is_refused_in_words(folder: Path) -> None:
    (folder / "runs" / "tiny").mkdir(parents=True)
    (folder / "runs" / "tiny" / "slurm").write_text("a file")

    words = ["--set", "training.overwrite_output_dir=true"]
    done = _launch(folder, "--slurm", *words)

    assert done.returncode == 5
    assert "nothing was submitted: " in done.stderr
    assert "Traceback" not in done.stderr
    assert not (folder / "runs" / "tiny" / "plans").exists()


UNHEARD = (
    "echo 'sbatch: error: Batch job submission failed: Socket timed out on send/recv operation'"
)


@pytest.mark.parametrize("sbatch", ["exec sleep 60", f"{UNHEARD} >&2; exit 1"])
def test_a_job_that_may_have_been_taken_keeps_its_files(
    folder: Path, monkeypatch: pytest.MonkeyPatch, sbatch: str
) -> None:
    from bigtrain.errors import LaunchError
    from bigtrain.planning import Request, Surroundings, make_plan
    from bigtrain.slurm import client
    from bigtrain.slurm.settings import SlurmSettings
    from bigtrain.slurm.submit import submit

    _command(folder.parent, "sbatch", f"#!/bin/bash\n{sbatch}\n")
    monkeypatch.setenv("PATH", f"{folder.parent}/bin:/usr/bin:/bin")
    monkeypatch.setattr(client, "_PATIENCE_S", 0.2)
    plan = make_plan(Request(target="run.yaml"), Surroundings(environment={}, working_dir=folder))

    with pytest.raises(LaunchError, match="the job may have been taken all the same: squeue --me"):
        submit(plan, settings=SlurmSettings(), environment={"HOME": str(folder)})
    assert (folder / "runs/tiny/plans/attempt-01.json").exists()
    assert (folder / "runs/tiny/slurm/attempt-01.sbatch").exists()


def test_a_snapshot_has_the_code_and_no_run(folder: Path) -> None:
    (folder / ".gitignore").write_text("data/\n__pycache__/\n")
    (folder / "data").mkdir()
    (folder / "data" / "t.jsonl").write_text("{}\n")
    library = folder.parent / "library"
    library.mkdir()
    (library / "inner.py").write_text("x = 1\n")
    _committed(library)
    (folder / "gone.py").write_text("")
    (folder / "link.py").symlink_to(folder / "gone.py")
    _git(folder, "init", "-q")
    _git(folder, "submodule", "add", "-q", str(library), "library")
    _committed(folder)

    for attempt in (1, 2, 3):
        (folder / "new.py").write_text(f"{attempt}\n")
        done = _launch(
            folder, "--slurm", "--snapshot", "--set", "training.overwrite_output_dir=true"
        )
        assert done.returncode == 0, done.stderr
        (folder / "runs" / "other" / "plans").mkdir(parents=True, exist_ok=True)
        (folder / "runs" / "other" / "plans" / "attempt-01.json").write_text("{}")
        (folder / "runs" / "other" / "model.bin").write_text("large")

    copy = folder / "runs" / "tiny" / "code" / "attempt-03"
    files = {str(path.relative_to(copy)) for path in copy.rglob("*") if path.name[0] != "."}
    assert files == {
        *("data", "gone.py", "library", "library/inner.py", "link.py", "new.py", "run.yaml")
    }
    assert (copy / "new.py").read_text() == "3\n"
    assert (copy / "data" / "t.jsonl").read_text() == "{}\n"
    assert (copy / "data").readlink() == folder / "data"
    assert (copy / "link.py").readlink() == copy / "gone.py"
    plan = json.loads((folder / "runs/tiny/plans/attempt-03.json").read_text())
    assert (plan["working_dir"], plan["source"]) == (str(copy), str(copy / "run.yaml"))


def test_a_snapshot_finds_what_lies_outside_of_the_work_tree_and_what_runs_have_written(
    folder: Path,
) -> None:
    home = folder.parent
    (home / "data").mkdir()
    for name in ("a.txt", "b.txt"):
        (home / "data" / name).write_text("some text\n")
    (folder / "here.txt").write_text("some text\n")
    (folder / "linked").symlink_to("../data")
    earlier = folder / "runs" / "earlier"
    (earlier / "plans").mkdir(parents=True)
    (earlier / "plans" / "attempt-01.json").write_text("{}")
    (earlier / "tokens").mkdir()
    (earlier / "tokens" / "tokenizer_config.json").write_text("{}")
    files = "{train_files: [../data/*.txt, here.txt, linked/a.txt], eval_files: ../data/b.txt}"
    run = RUN.replace("{name: builtin:python-docs, sequence_length: 128}", files)
    run = run.replace("{kind: bytes}", "{name: runs/earlier/tokens}")
    run = run.replace("use_cpu: true", "use_cpu: true, logging_dir: ../tensorboard, run_name: runs")
    (folder / "run.yaml").write_text(run)
    _git(folder, "init", "-q")
    _git(folder, "add", "run.yaml", "linked", "here.txt")
    _git(folder, "commit", "-q", "-m", "first")

    done = _launch(folder, "--slurm", "--snapshot")

    assert done.returncode == 0, done.stderr
    plan = json.loads((folder / "runs/tiny/plans/attempt-01.json").read_text())
    assert plan["data"]["train_files"] == [f"{home}/data/*.txt", "here.txt", "linked/a.txt"]
    assert plan["data"]["eval_files"] == [f"{home}/data/b.txt"]
    assert plan["tokenizer"]["name"] == str(earlier / "tokens")
    assert plan["training"]["logging_dir"] == f"{home}/tensorboard"
    assert plan["training"]["run_name"] == "runs"
    copy = Path(plan["working_dir"])
    assert (copy / "linked" / "a.txt").read_text() == "some text\n"
    assert (copy / "here.txt").is_file()


def test_a_script_of_a_snapshot_gets_no_path_that_would_lead_elsewhere(folder: Path) -> None:
    (folder / "run.yaml").unlink()
    (folder / "train.py").write_text("")
    _committed(folder)
    where = ("--slurm", "--snapshot", "--procs-per-node", "1", "--sbatch", "time=60")

    done = _launch(folder, *where, "--", "--data=../data", "..", "./x", "-1", target="train.py")

    assert done.returncode == 2
    for word in ("--data=../data", ".."):
        assert (
            f"{word}: it leads out of {folder}, of which --snapshot runs a copy; give the script "
            "an absolute path, or leave --snapshot out\n"
        ) in done.stderr
    assert "./x" not in done.stderr
    assert not (folder / "runs").exists()


def test_a_snapshot_of_no_work_tree_is_refused_by_a_dry_run_too(folder: Path) -> None:
    for more in ([], ["--dry-run"]):
        done = _launch(folder, "--slurm", "--snapshot", *more)
        assert done.returncode == 2
        assert "is in no git work tree with a commit" in done.stderr


def test_a_file_that_was_deleted_is_not_in_the_next_snapshot_of_the_same_attempt(
    folder: Path,
) -> None:
    _committed(folder)
    (folder / "old.py").touch()
    stale = folder / "runs" / "tiny" / "code" / "attempt-01"
    stale.mkdir(parents=True)
    (stale / "old.py").touch()
    (folder / "old.py").unlink()

    words = ["--snapshot", "--set", "training.overwrite_output_dir=true"]
    done = _launch(folder, "--slurm", *words)

    assert done.returncode == 0, done.stderr
    assert not (stale / "old.py").exists()
    assert (stale / "run.yaml").exists()


def test_what_the_job_itself_writes_is_no_change_of_the_code(folder: Path) -> None:
    from bigtrain.slurm import provenance
    from bigtrain.slurm.record import SubmissionRecord

    _committed(folder)
    axis = ["--sweep", "training.seed=1,2"]
    for words, place in (([], "runs/tiny"), (axis, "runs/tiny/seed=2")):
        more = ["--set", "training.overwrite_output_dir=true"]
        done = _launch(folder, "--slurm", *words, *more)
        assert done.returncode == 0, done.stderr
        (folder / "runs" / "tiny" / "slurm-123_0.out").touch()
        (record,) = (folder / place / "slurm").glob("attempt-*.json")
        read = SubmissionRecord.read(record)
        assert read is not None
        assert read.code is not None
        assert provenance.changes(read.code) == []

    (folder / "run.yaml").write_text(RUN + "\n")
    assert provenance.changes(read.code) == [f"edited in {folder}: run.yaml"]


def test_a_git_that_is_slow_keeps_no_node_waiting(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bigtrain.errors import LaunchError
    from bigtrain.slurm import provenance

    _command(folder.parent, "git", "#!/bin/bash\nexec sleep 60\n")
    monkeypatch.setenv("PATH", f"{folder.parent}/bin:{os.environ['PATH']}")
    then = provenance.CodeState(root=str(folder), commit="0" * 40)
    with pytest.raises(LaunchError, match=r"git rev-parse has not answered for 0\.2 s"):
        provenance.changes(then, patience_s=0.2)


def test_what_sbatch_remarks_of_a_job_that_it_takes_is_passed_on(folder: Path) -> None:
    remark = "sbatch: warning: your project has 3 GPU-hours left"
    _command(folder.parent, "sbatch", f"#!/bin/bash\necho 123; printf '{remark}\\n\\nbye\\n' >&2\n")

    done = _launch(folder, "--slurm")

    assert done.stdout.startswith("job 123, ")
    assert done.stderr == f"note: {remark}\nnote: bye\n"


def test_a_second_job_for_the_same_directory_is_said(folder: Path) -> None:
    again = ["--slurm", "--set", "training.overwrite_output_dir=true"]
    _command(folder.parent, "squeue", "#!/bin/bash\n[ $3 = --jobs=123 ] && echo RUNNING\n")
    assert "note:" not in _launch(folder, *again).stderr

    done = _launch(folder, *again)
    assert done.returncode == 0
    assert done.stderr == (
        "note: job 123 (RUNNING) writes to the same output_dir; while it runs this one can't "
        "(--sbatch dependency=afterany:123 makes it wait)\n"
    )
    assert "note:" not in _launch(folder, *again, "--sbatch", "dependency=afterany:124").stderr
    (folder.parent / "bin" / "squeue").unlink()
    assert "note:" not in _launch(folder, *again).stderr


def test_a_job_for_more_nodes_than_there_are_is_said_to_wait(folder: Path) -> None:
    rows = "echo 'debug*|3|8|1|gpu:1'; echo 'debug*|1|8|1|gpu:2'"
    _command(folder.parent, "sinfo", f"#!/bin/bash\n{rows}\n")

    def notes(number: int, *more: str) -> str:
        again = ("--set", "training.overwrite_output_dir=true", *more)
        done = _launch(folder, "--slurm", "--nodes", str(number), *again)
        assert done.returncode == 0, done.stderr
        return done.stderr

    assert notes(4) == ""
    said = "note: the job asks for {}, and its partition has {}: it may never start\n"
    assert notes(5) == said.format("5 nodes", "4")
    assert notes(4, "--sbatch", "spare_nodes=1") == said.format("5 nodes", "4")
    gpus = ("--set", "training.use_cpu=false", "--device-memory", "80GB")
    assert notes(2, *gpus) == said.format("2 nodes", "1 with 2 GPUs or more")


def test_a_partition_that_is_not_there_is_told_with_those_that_are(folder: Path) -> None:
    (folder.parent / "refuse").touch()
    _command(folder.parent, "sinfo", "#!/bin/bash\nprintf 'cpu\\nlong\\ncpu\\n'\n")
    done = _launch(folder, "--slurm", "--partition", "gpu")
    assert done.returncode == 5
    assert "there is no partition gpu; there are cpu, long\n" in done.stderr
    done = _launch(folder, "--slurm", "--partition", "cpu")
    assert "there is no partition" not in done.stderr
