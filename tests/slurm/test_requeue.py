"""The end of the batch scripts, as bash, with commands of Slurm's that note what they are told."""

from __future__ import annotations

import dataclasses
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from slurm_plans import make_plan

from bigtrain.share import bundled_file
from bigtrain.slurm.script import JobRequest, render
from bigtrain.slurm.settings import SlurmSettings

SCRIPTS = ["train.sbatch", "apptainer.sbatch", "own_script.sbatch"]
ALONE = '[[ "$*" = *%A* ]] && echo "5000 RUNNING 5000" || echo RUNNING'
ARRAY = """\
case "$*" in
  *%A*) columns='4713 RUNNING 4712_0|4712 RUNNING 4712_1' ;;
  *--job=4712_*) columns=RUNNING ;;
  *) columns='RUNNING|RUNNING' ;;
esac
tr '|' '\\n' <<<"$columns"
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ended:
    """A batch script that has ended."""

    code: int
    output: str
    requeued: list[str]


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., Ended]:
    """A script whose run ends with 85: `run(script, setup=, squeue=, …)`."""
    place = tmp_path / "bin"
    place.mkdir()

    def command(name: str, text: str) -> None:
        (place / name).write_text(f"#!/bin/bash\n{text}\n")
        (place / name).chmod(0o755)

    def run_script(
        script: str,
        *,
        setup: str = "",
        squeue: str = ALONE,
        scontrol: str = "",
        runs: int = 1,
        **environment: str,
    ) -> Ended:
        command("srun", "exit 85")
        command("sleep", "")
        command("squeue", squeue)
        command("scontrol", f'echo "$*" >>{tmp_path}/scontrol.log\n{scontrol}')
        done = subprocess.run(
            ["bash", _written(script, tmp_path, runs=runs, setup=setup), "run.yaml"],
            env={
                "PATH": f"{place}:{os.environ['PATH']}",
                "SLURM_SUBMIT_DIR": str(tmp_path),
                "APPTAINER_IMAGE": "image.sif",
                **environment,
            },
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        log = tmp_path / "scontrol.log"
        return Ended(
            code=done.returncode,
            output=done.stdout + done.stderr,
            requeued=log.read_text().splitlines() if log.exists() else [],
        )

    return run_script


def _written(script: str, folder: Path, *, runs: int, setup: str) -> Path:
    text = bundled_file(f"slurm/{script}").read_text()
    if script != "own_script.sbatch":
        plans = [make_plan(output_dir=folder / str(k), source=folder / "t.py") for k in range(runs)]
        paths = tuple(folder / f"{k}.json" for k in range(runs))
        settings = SlurmSettings(setup=setup)
        request = JobRequest(plans=tuple(plans), plan_paths=paths, settings=settings)
        text = render(request, template=text)
    path = folder / "job.sbatch"
    path.write_text(text)
    return path


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_job_of_an_array_that_has_the_arrays_number_puts_itself_alone_back(
    run: Callable[..., Ended], script: str
) -> None:
    array = {"SLURM_ARRAY_JOB_ID": "4712", "SLURM_ARRAY_TASK_ID": "1"}
    ended = run(script, squeue=ARRAY, runs=2, SLURM_JOB_ID="4712", **array)
    assert (ended.code, ended.requeued) == (85, ["requeue 4712_1"])


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_job_that_one_of_an_array_has_submitted_puts_itself_back(
    run: Callable[..., Ended], script: str
) -> None:
    inherited = {"SLURM_ARRAY_JOB_ID": "4712", "SLURM_ARRAY_TASK_ID": "1"}
    ended = run(script, SLURM_JOB_ID="5000", **inherited)
    assert ended.requeued == ["requeue 5000"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_what_was_cancelled_while_it_saved_is_not_put_back(
    run: Callable[..., Ended], script: str
) -> None:
    squeue = ALONE.replace("RUNNING", "COMPLETING")
    ended = run(script, squeue=squeue, SLURM_JOB_ID="5000")
    assert (ended.code, ended.requeued, ended.output) == (85, [], "")


UNHEARD = "echo 'squeue: error: Socket timed out on send/recv operation' >&2; exit 1"


def _from_third_call_on(counter: Path, text: str) -> str:
    """A command that fails twice."""
    return f'echo >>{counter}; [ "$(wc -l <{counter})" -gt 2 ] || {{ {UNHEARD}; }}\n{text}'


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_controller_that_is_busy_for_a_while_costs_no_new_start(
    run: Callable[..., Ended], tmp_path: Path, script: str
) -> None:
    squeue = _from_third_call_on(tmp_path / "squeues", ALONE)
    scontrol = _from_third_call_on(tmp_path / "scontrols", "")
    ended = run(script, squeue=squeue, scontrol=scontrol, SLURM_JOB_ID="5000")
    assert ended.code == 85
    assert ended.requeued == ["requeue 5000"] * 3
    assert "did not put" not in ended.output


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_controller_that_never_answers_is_said_with_what_to_type(
    run: Callable[..., Ended], script: str
) -> None:
    ended = run(script, squeue=UNHEARD, SLURM_JOB_ID="5000")
    assert (ended.code, ended.requeued) == (85, [])
    (said,) = [line for line in ended.output.splitlines() if "did not put" in line]
    assert "scontrol requeue" in said
    assert "5000" in said


def test_a_requeue_that_slurm_refuses_is_said(run: Callable[..., Ended]) -> None:
    ended = run("train.sbatch", squeue="echo RUNNING", scontrol="exit 1", SLURM_JOB_ID="5000")
    assert (ended.code, set(ended.requeued)) == (85, {"requeue 5000"})
    assert ended.output.endswith(
        "bigtrain: Slurm did not put the job back into the queue; to go on: scontrol requeue 5000\n"
    )


@pytest.mark.parametrize("script", ["train.sbatch", "apptainer.sbatch"])
def test_a_setup_may_extend_a_variable_that_is_not_set(
    run: Callable[..., Ended], script: str
) -> None:
    ended = run(script, setup="export UNKNOWN=/x:$UNKNOWN", SLURM_JOB_ID="5000")
    assert ended.requeued == ["requeue 5000"]
    assert "unbound" not in ended.output
