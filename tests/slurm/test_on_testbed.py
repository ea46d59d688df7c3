"""Whole runs on a real Slurm cluster of four nodes (tests/slurm/slurm_testbed.py)."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from scripts_on_testbed import COLLECTIVE, PLAIN, Run, agent_of, agents, alarming
from slurm_plans import make_plan

from bigtrain.plan import read_plan
from bigtrain.slurm.jobs import cancel, list_jobs
from bigtrain.slurm.settings import read_settings
from bigtrain.slurm.submit import submit

if TYPE_CHECKING:
    from slurm_testbed import Testbed

pytestmark = pytest.mark.slurm
CHECKOUT = Path(__file__).resolve().parents[2]


def test_four_nodes_train_and_end_without_one_alarming_line(start: Callable[..., Run]) -> None:
    run = start(COLLECTIVE, nodes=4, preload=("torch",))
    run.ended("COMPLETED")
    met, result = run.text().splitlines()
    assert met.startswith("4 nodes met at 10.") and "(eth0)" in met
    assert result == "sum 4 gpus 0,1"
    logs = Path(run.plan.output_dir) / "logs" / "attempt-01"
    assert sorted(path.name for path in logs.iterdir()) == [
        f"node-{k:03d}-node{k}" for k in range(4)
    ]
    assert (logs / "node-002-node2" / "rank-00002.log").is_file()


def test_a_failing_rank_ends_all_nodes_with_one_message_that_names_it(
    start: Callable[..., Run],
) -> None:
    run = start(PLAIN, "fail")
    job = run.ended("FAILED")
    assert job["ExitCode"] == "1:0"
    text = run.text()
    assert text.count("rank 1 on node1 failed with exit code 1") == 1
    assert text.count("ValueError: broken on purpose") == 1
    assert "node-001-node1/rank-00001.log" in text


def test_a_cancelled_run_stays_cancelled(start: Callable[..., Run]) -> None:
    run = start(PLAIN, "wait")
    run.wait_for_ranks()
    (listed,) = list_jobs(environment=run.environment)
    assert (listed.job_id, listed.state, listed.name) == (run.job_id, "RUNNING", "trial")
    assert cancel("trial", environment=run.environment) == run.job_id
    run.ended("CANCELLED")
    time.sleep(2)
    assert run.bed.job(run.job_id)["JobState"] == "CANCELLED"
    assert run.bed.job(run.job_id)["ExitCode"].startswith("143")
    assert list_jobs(environment=run.environment) == []
    (ended,) = list_jobs(environment=run.environment, ended=True)
    assert ended.state == "CANCELLED"


def test_the_record_of_a_submission_is_kept_and_named_in_no_plan(start: Callable[..., Run]) -> None:
    run = start(PLAIN, "pass")
    run.ended("COMPLETED")
    record = json.loads((Path(run.plan.output_dir) / "slurm" / "attempt-01.json").read_text())
    assert record["job_id"] == run.job_id
    assert len(record["script_sha256"]) == 64
    script = (Path(run.plan.output_dir) / "slurm" / "attempt-01.sbatch").read_text()
    assert script.startswith("#!/bin/bash")
    assert read_plan(Path(run.plan.output_dir) / "plans" / "attempt-01.json") == run.plan


@pytest.mark.slow
def test_a_notice_is_a_new_start_that_resumes(start: Callable[..., Run]) -> None:
    run = start(PLAIN, "wait", section={"signal": "USR2@30"}, resume="never")
    run.wait_for_ranks()
    run.bed.run("scancel", "--signal=USR2", run.job_id)
    run.wait_for_ranks(restarted=True, timeout_s=150)
    run.ended("COMPLETED")
    assert run.bed.job(run.job_id)["Restarts"] == "1"
    assert "going on in a new start" in run.text()
    second = read_plan(Path(run.plan.output_dir) / "plans" / "attempt-02.json")
    assert (second.attempt, second.resume) == (2, "auto")


@pytest.mark.slow
def test_what_is_cancelled_after_a_notice_stays_cancelled(start: Callable[..., Run]) -> None:
    leaves_late = PLAIN.replace("sys.exit(143 if", "time.sleep(3); os._exit(143 if")
    run = start(leaves_late, "wait")
    run.wait_for_ranks()
    run.bed.run("scancel", "--signal=USR2", run.job_id)
    time.sleep(1)
    run.bed.run("scancel", run.job_id)
    run.ended("CANCELLED")
    time.sleep(3)
    job = run.bed.job(run.job_id)
    assert (job["JobState"], job["Restarts"]) == ("CANCELLED", "0")
    assert "going on in a new start" not in run.text()


@pytest.mark.slow
def test_the_time_limit_sends_the_notice_ahead(start: Callable[..., Run]) -> None:
    # Slurm may give it 30 s earlier: never within the first 30 s.
    run = start(PLAIN, "wait", section={"signal": "USR2@60", "time": "00:02:00"})
    run.wait_for_ranks()
    run.ended("PENDING", timeout_s=120)
    assert run.bed.job(run.job_id)["Restarts"] == "1"
    run.bed.run("scancel", run.job_id)


@pytest.mark.slow
def test_max_requeues_ends_it_and_says_so(start: Callable[..., Run]) -> None:
    run = start(PLAIN, "wait", section={"max_requeues": 0})
    run.wait_for_ranks()
    run.bed.run("scancel", "--signal=USR1", run.job_id)
    assert run.ended("FAILED")["ExitCode"] == "85:0"
    assert f"job {run.job_id} has had its 0 new starts (max_requeues)" in run.text()


@pytest.mark.slow
def test_slurms_own_requeue_lets_the_ranks_leave_and_starts_again(
    start: Callable[..., Run],
) -> None:
    run = start(PLAIN, "wait")
    run.wait_for_ranks()
    run.bed.run("scontrol", "requeue", run.job_id)
    run.wait_for_ranks(restarted=True, timeout_s=150)
    run.ended("COMPLETED")
    assert run.bed.job(run.job_id)["Restarts"] == "1"


@pytest.mark.slow
@pytest.mark.parametrize("node", [0, 2])
def test_an_agent_that_is_killed_is_a_node_lost_and_named(
    start: Callable[..., Run], node: int
) -> None:
    run = start(PLAIN, "wait")
    run.wait_for_ranks()
    os.kill(agent_of(run, node=node), signal.SIGKILL)
    run.ended("PENDING", timeout_s=60)
    assert f"node{node} vanished" in run.text()
    assert run.bed.job(run.job_id)["Restarts"] == "1"
    run.bed.run("scancel", run.job_id)


@pytest.mark.slow
def test_a_node_whose_link_is_down_is_named_and_ends_its_ranks_by_itself(
    start_to_lose: Callable[..., Run],
) -> None:
    run = start_to_lose(PLAIN, "wait")
    run.wait_for_ranks()
    run.bed.set_link(1, up=False)
    cut = time.monotonic()
    while "node1 vanished" not in run.text():
        assert time.monotonic() < cut + 60, run.text()
        time.sleep(0.5)
    while agents(run):  # also on the node that is cut off: nothing goes on writing there
        assert time.monotonic() < cut + 90, agents(run)
        time.sleep(0.5)
    run.ended("PENDING", timeout_s=60)
    assert run.text().count("node1 vanished") == 1
    assert run.bed.job(run.job_id)["Restarts"] == "1"


@pytest.mark.slow
def test_a_run_on_a_node_whose_slurmd_is_killed_is_started_again_and_the_node_named(
    start_to_lose: Callable[..., Run],
) -> None:
    run = start_to_lose(PLAIN, "wait")
    run.wait_for_ranks()
    run.bed.kill_daemon(1)
    run.ended("PENDING", timeout_s=90)
    assert "Node failure on node1" in run.text()
    assert run.bed.job(run.job_id)["Restarts"] == "1"


@pytest.mark.slow
def test_a_rank_that_is_killed_is_named_with_its_signal(start: Callable[..., Run]) -> None:
    run = start(PLAIN, "wait")
    run.wait_for_ranks()
    logs = Path(run.plan.output_dir) / "logs" / "attempt-01" / "node-001-node1" / "agent.log"
    (line,) = [line for line in logs.read_text().splitlines() if "rank 1 is pid" in line]
    os.kill(int(line.rpartition(" ")[2]), signal.SIGKILL)
    assert run.ended("FAILED")["ExitCode"] == "137:0"
    assert run.text().count("rank 1 on node1 was killed by SIGKILL") == 1


@pytest.mark.slow
def test_a_node_that_starts_late_is_waited_for(start: Callable[..., Run]) -> None:
    run = start(PLAIN, "pass", wrapper='[ "$SLURM_NODEID" = 2 ] && sleep 30')
    run.ended("COMPLETED")
    assert "2 of 3 nodes are here; waiting for node2" in run.text()


@pytest.mark.slow
def test_a_host_name_that_does_not_resolve_is_met_by_its_address(
    start: Callable[..., Run], tmp_path: Path
) -> None:
    (tmp_path / "hosts").write_text("127.0.0.1 localhost\n")
    wrapper = (
        f'exec unshare --mount bash -c "mount --bind {tmp_path}/hosts /etc/hosts; exec \\"\\$@\\"" '
        'bash "$@"'
    )
    run = start(PLAIN, "pass", wrapper=wrapper)
    run.ended("COMPLETED")
    assert alarming(run.text()) == []


@pytest.mark.slow
def test_a_port_that_is_taken_on_the_first_node_is_passed_over(
    start: Callable[..., Run], tmp_path: Path
) -> None:
    (tmp_path / "sit.py").write_text(
        "import os, socket, sys, time\n"
        f"sys.path.insert(0, {str(CHECKOUT)!r})\n"
        "from bigtrain.cluster.rendezvous_address import candidate_ports\n"
        'ports = candidate_ports("{SLURM_JOB_ID}.{SLURM_STEP_ID}".format(**os.environ))\n'
        'taken = socket.create_server(("0.0.0.0", ports[0]))\n'
        "print('met', ports[1], flush=True)\n"
        f"open({str(tmp_path / 'sits')!r}, 'w').close()\n"
        "agent = os.getppid()\n"
        "while os.getppid() == agent:\n"
        "    time.sleep(0.1)\n"
    )
    sit = f"{sys.executable} {tmp_path}/sit.py & until [ -e {tmp_path}/sits ]; do sleep 0.1; done"
    wrapper = f'[ "$SLURM_NODEID" = 0 ] && {{ {sit}; }}'
    run = start(PLAIN, "pass", wrapper=wrapper)
    run.ended("COMPLETED")
    (expected,) = [line for line in run.text().splitlines() if line.startswith("met")]
    assert f":{expected.split()[1]} (eth0)" in run.text()


@pytest.mark.slow
def test_a_different_version_on_one_node_is_refused_with_a_table(
    start: Callable[..., Run], tmp_path: Path
) -> None:
    odd = tmp_path / "odd" / "torch-1.0.dist-info"
    odd.mkdir(parents=True)
    (odd / "METADATA").write_text("Metadata-Version: 2.1\nName: torch\nVersion: 1.0\n")
    wrapper = f'[ "$SLURM_NODEID" = 1 ] && export PYTHONPATH={odd.parent}'
    run = start(PLAIN, "pass", wrapper=wrapper)
    assert run.ended("FAILED")["ExitCode"] == "5:0"
    text = run.text()
    assert text.count("versions differ; install the same everywhere") == 1
    assert "  node1  1.0" in text


@pytest.mark.slow
def test_storage_that_is_not_shared_is_refused_with_the_right_value(
    start: Callable[..., Run], tmp_path: Path
) -> None:
    out, plan = tmp_path / "out", tmp_path / "plan.json"
    inner = f"mount -t tmpfs none {out}; mkdir {out}/plans; cp {plan} {out}/plans/attempt-01.json"
    wrapper = (
        f'[ "$SLURM_NODEID" = 1 ] && cp {out}/plans/attempt-01.json {plan} && '
        f'exec unshare --mount bash -c "{inner}; exec \\"\\$@\\"" bash "$@"'
    )
    run = start(PLAIN, "pass", wrapper=wrapper)
    assert run.ended("FAILED")["ExitCode"] == "5:0"
    assert "node1 can't see what node0 wrote there" in run.text()
    assert "give an output_dir that all nodes share" in run.text()


@pytest.mark.slow
def test_a_sweep_is_an_array_whose_jobs_take_one_plan_each(
    bed: Testbed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in bed.environment.items():
        monkeypatch.setenv(name, value)
    source = tmp_path / "train.py"
    source.write_text('import os, sys; open(sys.argv[1], "w").write(os.environ["BIGTRAIN_PLAN"])\n')
    plans = [
        make_plan(
            name=f"trial/{k}",
            output_dir=tmp_path / f"out{k}",
            source=source,
            script_args=(str(tmp_path / f"done{k}"),),
            nodes=1,
            preload=(),
        )
        for k in range(2)
    ]
    settings = read_settings({"cpus_per_task": 1})
    taken = submit(plans, settings=settings, environment={"XDG_STATE_HOME": str(tmp_path)})
    for k in range(2):
        bed.wait_for(f"{taken.job_id}_{k}", "COMPLETED")
        expected = str(tmp_path / f"out{k}" / "plans" / "attempt-01.json")
        assert (tmp_path / f"done{k}").read_text() == expected
    listed = list_jobs(environment={"XDG_STATE_HOME": str(tmp_path)}, ended=True)
    assert [(job.job_id, job.name, job.state, job.output_dir) for job in listed] == [
        (f"{taken.job_id}_{k}", f"trial/{k}", "COMPLETED", str(tmp_path / f"out{k}"))
        for k in range(2)
    ]


@pytest.mark.slow
@pytest.mark.parametrize("index", [0, 1])
def test_of_a_sweep_exactly_the_run_that_was_given_notice_is_started_again(
    bed: Testbed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, index: int
) -> None:
    for name, value in bed.environment.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "train.py").write_text(PLAIN)
    marks = [tmp_path / f"marks{k}" for k in range(2)]
    plans = []
    for k, place in enumerate(marks):
        place.mkdir()
        plans.append(
            make_plan(
                name=f"trial/{k}",
                output_dir=tmp_path / f"out{k}",
                source=tmp_path / "train.py",
                script_args=("wait" if k == index else "pass", str(place)),
                nodes=1,
                preload=(),
            )
        )
    settings = read_settings({"cpus_per_task": 1})
    taken = submit(plans, settings=settings, environment={"XDG_STATE_HOME": str(tmp_path)})
    noticed, other = (f"{taken.job_id}_{k}" for k in (index, 1 - index))
    bed.wait_for(other, "COMPLETED")
    _wait_until_there(marks[index] / "started-0-0")
    bed.run("scancel", "--signal=USR2", noticed)
    _wait_until_there(marks[index] / "started-0-1")
    assert bed.wait_for(noticed, "COMPLETED")["Restarts"] == "1"
    assert bed.job(other)["Restarts"] == "0"
    assert not (marks[1 - index] / "started-0-1").exists()
    log = tmp_path / f"slurm-{noticed}.out"
    assert f"going on in a new start of job {noticed}" in log.read_text()


def _wait_until_there(path: Path) -> None:
    limit = time.monotonic() + 120
    while not path.exists():
        assert time.monotonic() < limit, f"no {path}"
        time.sleep(0.1)
