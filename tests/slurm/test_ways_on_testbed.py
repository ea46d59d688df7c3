"""Other ways into a real Slurm cluster than a job of the run's own, starts that are too many."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from scripts_on_testbed import PLAIN, Run, agent_of
from slurm_plans import make_plan

from bigtrain.plan import RunPlan
from bigtrain.slurm.jobs import cancel, list_jobs
from bigtrain.slurm.settings import read_settings
from bigtrain.slurm.submit import describe, submit

if TYPE_CHECKING:
    from slurm_testbed import Testbed

pytestmark = [pytest.mark.slurm, pytest.mark.slow]

# What `apptainer exec` is given, and what it does as far as a process can tell.
APPTAINER = """\
#!/bin/bash
echo "$SLURM_NODEID $*" >>"$APPTAINER_LOG"
[ "$1 $2 $3 $5" = "exec --nv --bind image.sif" ] || exit 64
shift 5
exec "$@"
"""


def _wait_until(holds: Callable[[], bool], what: Callable[[], str], *, timeout_s: float) -> None:
    limit = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < limit, what()
        time.sleep(0.2)


def test_inside_an_allocation_srun_starts_a_node_of_the_run_on_each_node(
    bed: Testbed, tmp_path: Path
) -> None:
    (tmp_path / "train.py").write_text(PLAIN)
    launch = (sys.executable, "-m", "bigtrain", "launch", "train.py", "--procs-per-node", "2")
    srun = ("srun", "--ntasks-per-node=1", *launch, "--output-dir", "out", "--", "pass")
    done = bed.run("salloc", "--nodes=2", *srun, tmp_path, cwd=tmp_path, timeout_s=120)
    assert "2 nodes met at 10." in done.stderr
    assert {path.name for path in tmp_path.glob("started-*")} == {
        f"started-{rank}-0" for rank in range(4)
    }
    logs = {path.parent.name for path in (tmp_path / "out" / "logs").glob("*/*/rank-*.log")}
    assert logs == {"node-000-node0", "node-001-node1"}


def test_every_node_of_a_job_in_an_apptainer_image_enters_it(
    start: Callable[..., Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    programs = {"apptainer": APPTAINER, "python3": f'#!/bin/bash\nexec {sys.executable} "$@"\n'}
    (tmp_path / "bin").mkdir()
    for name, text in programs.items():
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.setenv("APPTAINER_LOG", str(tmp_path / "entered"))
    checkout = Path(__file__).resolve().parents[2]
    image = f"export APPTAINER_IMAGE=image.sif PATH={tmp_path}/bin:$PATH PYTHONPATH={checkout}"
    section = {"template": "apptainer.sbatch", "python": "python3", "setup": image}
    run = start(PLAIN, "pass", section=section)
    run.ended("COMPLETED")
    entered = sorted((tmp_path / "entered").read_text().splitlines())
    assert [line.split()[0] for line in entered] == ["0", "1", "2"]
    assert all(" image.sif python3 -m bigtrain.slurm.node /" in line for line in entered)


def test_modules_are_loaded_in_order_and_then_comes_the_setup(
    start: Callable[..., Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    modules = tmp_path / "modules.sh"  # what a login shell of a cluster defines
    modules.write_text('module() { LOADED="${LOADED:-} $*"; }\n')
    monkeypatch.setenv("BASH_ENV", str(modules))
    setup = f'echo "$LOADED" >{tmp_path}/loaded; export FROM_SETUP=yes'
    script = 'import os, sys; open(sys.argv[1] + "/told", "w").write(os.environ["FROM_SETUP"])\n'
    run = start(script, nodes=1, section={"modules": ["cuda/12.4", "nccl"], "setup": setup})
    run.ended("COMPLETED")
    assert (tmp_path / "loaded").read_text() == " load cuda/12.4 load nccl\n"
    assert (tmp_path / "told").read_text() == "yes"


def test_slurm_reads_the_lines_of_a_script_as_they_were_meant(bed: Testbed, tmp_path: Path) -> None:
    comment = 'say "hello" \\ $USER #1'
    said = {"comment": comment, "exclusive": True, "hold": True, "time": "1-02", "nice": 7}
    plan = make_plan(
        name="50% of 'it'", output_dir=tmp_path / "a 'b' #c", source=tmp_path / "train.py", nodes=1
    )
    settings = read_settings({**said, "cpus_per_task": 1})
    script = tmp_path / "job.sbatch"
    script.write_text(describe(plan, settings=settings))
    job_id = bed.run("sbatch", "--parsable", script, cwd=tmp_path).stdout.strip()
    columns = ("squeue", "--noheader", f"--jobs={job_id}", "--format=%k|%j|%l|%r|%h")
    shown = bed.run(*columns).stdout.strip()
    assert shown == f"{comment}|50% of 'it'|1-02:00:00|JobHeldUser|NO"
    job = bed.run("scontrol", "show", "job", job_id).stdout
    assert f"StdOut={tmp_path}/a 'b' #c/slurm-{job_id}.out" in job
    bed.run("scancel", job_id)


def test_a_job_waits_for_the_one_that_it_depends_on(
    bed: Testbed, tmp_path: Path, start: Callable[..., Run]
) -> None:
    hold = bed.run("sbatch", "--parsable", "--hold", "--wrap=true", cwd=tmp_path).stdout.strip()
    run = start(PLAIN, "pass", section={"dependency": [f"afterok:{hold}"]})
    (waiting,) = list_jobs(environment=run.environment)
    assert (waiting.state, waiting.reason) == ("PENDING", "Dependency")
    bed.run("scontrol", "release", hold)
    run.ended("COMPLETED")


def test_one_run_of_a_sweep_is_cancelled_and_the_others_go_on(
    bed: Testbed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in bed.environment.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "train.py").write_text(PLAIN)
    plans = [_plan(tmp_path, k) for k in range(2)]
    environment = {"XDG_STATE_HOME": str(tmp_path / "state")}
    settings = read_settings({"cpus_per_task": 1})
    job_id = submit(plans, settings=settings, environment=environment).job_id
    marks = [tmp_path / f"marks{k}" / "started-0-0" for k in range(2)]
    _wait_until(lambda: all(mark.exists() for mark in marks), lambda: "no start", timeout_s=60)
    assert cancel("trial/1", environment=environment) == f"{job_id}_1"
    bed.wait_for(f"{job_id}_1", "CANCELLED")
    (left,) = list_jobs(environment=environment)
    assert (left.job_id, left.state) == (f"{job_id}_0", "RUNNING")
    cancel("trial/0", environment=environment)
    bed.wait_for(f"{job_id}_0", "CANCELLED")


def _plan(folder: Path, number: int) -> RunPlan:
    (folder / f"marks{number}").mkdir()
    return make_plan(
        name=f"trial/{number}",
        output_dir=folder / f"out{number}",
        source=folder / "train.py",
        script_args=("stay", str(folder / f"marks{number}")),
        nodes=1,
        preload=(),
    )


def _restarts(run: Run, number: int) -> None:
    _wait_until(lambda: run.bed.job(run.job_id)["Restarts"] == str(number), run.text, timeout_s=60)
    run.wait_for_ranks(restarted=True, timeout_s=150)


def test_max_requeues_counts_the_new_starts(start: Callable[..., Run]) -> None:
    run = start(PLAIN, "stay", section={"max_requeues": 1})
    run.wait_for_ranks()
    run.bed.run("scancel", "--signal=USR2", run.job_id)
    _restarts(run, 1)
    run.bed.run("scancel", "--signal=USR2", run.job_id)
    assert run.ended("FAILED")["ExitCode"] == "85:0"
    assert f"job {run.job_id} has had its 1 new starts (max_requeues)" in run.text()


def test_a_job_that_loses_a_node_again_without_a_step_is_given_up(
    start: Callable[..., Run], tmp_path: Path
) -> None:
    (tmp_path / "out" / "checkpoint-5").mkdir(parents=True)
    run = start(PLAIN, "stay")
    run.wait_for_ranks()
    os.kill(agent_of(run, node=1), signal.SIGKILL)
    _restarts(run, 1)
    os.kill(agent_of(run, node=1), signal.SIGKILL)
    assert run.ended("FAILED")["ExitCode"] == "1:0"
    assert "the second start in a row that saved nothing new (checkpoint-5)" in run.text()
    assert run.text().count("going on in a new start of job") == 1
