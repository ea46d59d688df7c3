from __future__ import annotations

import dataclasses
import shutil
import subprocess
from pathlib import Path

import pytest
from slurm_plans import make_plan

from bigtrain.errors import ConfigError
from bigtrain.plan import RunPlan
from bigtrain.share import bundled_file
from bigtrain.slurm.script import JobRequest, render, sbatch_options
from bigtrain.slurm.settings import SlurmSettings, read_settings

GOLDEN = Path(__file__).with_name("golden")
TEMPLATES = ["train.sbatch", "apptainer.sbatch"]


def plan(**fields: object) -> RunPlan:
    defaults = {"output_dir": Path("/data/it's a run"), "source": Path("/home/me/train.py")}
    return make_plan(**(defaults | fields))  # type: ignore[arg-type]


def request(run: RunPlan, **section: object) -> JobRequest:
    settings = read_settings({"python": "/opt/venv/bin/python", **section})
    return JobRequest(
        plans=(run,),
        plan_paths=(Path(run.output_dir) / "plans" / "attempt-01.json",),
        settings=settings,
        cpus_per_task=32,
        package_root="/opt/site packages",
    )


CASES = {
    "gpu": request(plan(device="cuda", nodes=4, procs_per_node=8), partition="gpu", time="1-0"),
    "everything": request(
        plan(name="50% of it"),
        modules=["cuda/12.4", "nccl"],
        setup='export DATA="$HOME/data"\nulimit -l unlimited',
        gres="gpu:a100:2",
        comment='say "hello" \\ $USER',
        dependency=["afterok:12"],
        exclusive=True,
        signal="USR2@600",
        max_requeues=3,
    ),
    "pyxis": request(
        plan(),
        python="python3",
        container_image="docker://pytorch#x",
        container_mounts="/data:/data",
    ),
    "apptainer": request(plan(), python="python3", setup="export APPTAINER_IMAGE=/data/image.sif"),
    "spare": request(plan(), spare_nodes=1),
    "sweep": dataclasses.replace(
        request(plan()),
        plans=(plan(), plan(output_dir=Path("/data/two"))),
        plan_paths=(Path("/data/one/p.json"), Path("/data/two/p.json")),
    ),
}


@pytest.mark.parametrize("name", sorted(CASES))
def test_the_script_is_the_golden_text(name: str) -> None:
    template = f"slurm/{'apptainer' if name == 'apptainer' else 'train'}.sbatch"
    text = render(CASES[name], template=bundled_file(template).read_text())
    assert text == (GOLDEN / f"{name}.sbatch").read_text()


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="no shellcheck")
@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("name", [None, *sorted(CASES)])
def test_shellcheck_has_nothing_to_say(template: str, name: str | None, tmp_path: Path) -> None:
    script = bundled_file(f"slurm/{template}")
    if name is not None:
        text = render(CASES[name], template=script.read_text())
        script = tmp_path / "job.sbatch"
        script.write_text(text)
    done = subprocess.run(["shellcheck", script], capture_output=True, text=True, check=False)
    assert done.stdout == ""
    assert done.returncode == 0


def test_gpus_are_asked_for_without_being_told() -> None:
    assert sbatch_options(request(plan(device="cuda", procs_per_node=4)))["gpus-per-node"] == "4"
    said = sbatch_options(request(plan(device="cuda", procs_per_node=4), gres="gpu:a100:4"))
    assert "gpus-per-node" not in said
    assert "gpus-per-node" not in sbatch_options(request(plan(procs_per_node=4)))


def test_more_processes_than_gpus_are_refused_before_they_queue() -> None:
    with pytest.raises(ConfigError) as caught:
        sbatch_options(request(plan(device="cuda", procs_per_node=8), gpus_per_node=4))
    assert str(caught.value) == (
        "8 processes on each node need 8 GPUs, and cluster.slurm asks for 4; use --procs-per-node 4"
    )


def test_the_users_options_win() -> None:
    options = sbatch_options(request(plan(), cpus_per_task=7, no_requeue=True, job_name="mine"))
    assert options["cpus-per-task"] == "7"
    assert options["job-name"] == "mine"
    assert "requeue" not in options


@pytest.mark.parametrize("said", [{"requeue": False}, {"no_requeue": True}, {"requeue": "false"}])
def test_a_job_that_is_not_to_be_requeued_does_not_requeue_itself(said: dict[str, object]) -> None:
    job = request(plan(), **said)
    options = sbatch_options(job)
    assert "requeue" not in options
    assert options["no-requeue"] is None
    template = bundled_file("slurm/train.sbatch").read_text()
    assert "\nmax_requeues=0\n" in render(job, template=template)


def test_what_is_set_to_false_is_not_there_whoever_sets_it() -> None:
    off = dict.fromkeys(("exclusive", "hold", "signal", "cpus_per_task", "no_requeue"), False)
    options = sbatch_options(request(plan(), **off))
    assert not options.keys() & {"exclusive", "hold", "signal", "cpus-per-task", "no-requeue"}
    assert "requeue" in options
    with pytest.raises(ConfigError, match="slurm.no_kill: spare_nodes need it"):
        request(plan(), spare_nodes=1, no_kill=False)


@pytest.mark.parametrize(
    ("save_s", "time", "lead"),
    [
        (None, "24:00:00", 120),
        (59.0, "24:00:00", 120),
        (300.0, "1-0", 600),
        (7200.0, "1:00:00", 1800),
        (7200.0, "60", 1800),
        (None, "1:30", 45),
        (1e9, None, 65535),
        (300.0, "UNLIMITED", 600),
    ],
)
def test_the_notice_is_two_saves_ahead_and_never_more_than_half_of_the_time(
    save_s: float | None, time: str | None, lead: int
) -> None:
    job = request(plan(), **({} if time is None else {"time": time}))
    options = sbatch_options(dataclasses.replace(job, last_save_s=save_s))
    assert options["signal"] == f"USR2@{lead}"


def test_a_template_without_a_placeholder_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="exactly one line # @setup and one # @run"):
        render(request(plan()), template="#!/bin/bash\n# @options\n")


def test_runs_of_different_shapes_are_no_sweep() -> None:
    with pytest.raises(ConfigError, match="same nodes, processes and device"):
        JobRequest(
            plans=(plan(), plan(nodes=3)),
            plan_paths=(Path("/a"), Path("/b")),
            settings=SlurmSettings(),
        )


def test_runs_with_different_options_of_sbatch_are_no_sweep() -> None:
    with pytest.raises(ConfigError) as caught:
        JobRequest(
            plans=(plan(slurm={"qos": "x", "partition": "a"}), plan(slurm={"partition": "b"})),
            plan_paths=(Path("/a"), Path("/b")),
        )
    assert str(caught.value) == (
        "cluster.slurm.partition, cluster.slurm.qos: a sweep is one job array, whose jobs all have "
        "the same options; sweep something else, or submit twice"
    )
