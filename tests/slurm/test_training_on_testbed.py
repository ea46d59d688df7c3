"""The trainer itself on a real Slurm cluster of four nodes, through the command line."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from slurm_testbed import Testbed

pytestmark = pytest.mark.slurm

ALARMING = re.compile(r"error|warning|Traceback|Terminat|CANCELLED|Broken pipe|Killed|fail", re.I)
RUN_FILE = """\
name: tiny
output_dir: out
model:
  config:
    model_type: llama
    hidden_size: 32
    intermediate_size: 64
    num_hidden_layers: 2
    num_attention_heads: 2
    num_key_value_heads: 2
    max_position_embeddings: 64
tokenizer: {kind: bytes}
data: {name: builtin:python-docs, sequence_length: 64, max_samples: 100}
training:
  use_cpu: true
  max_steps: 6
  per_device_train_batch_size: 2
  logging_steps: 1
  save_steps: 3
  report_to: []
engine: fsdp
cluster:
  nodes: 4
  procs_per_node: 1
  slurm: {gres: "gpu:2", cpus_per_task: 1, time: 10:00}
"""


@dataclass
class Run:
    """A run file in a folder of its own, and the job that was made of it."""

    bed: Testbed
    folder: Path
    job_id: str = ""

    def bigtrain(self, *words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        return self.bed.run(
            *(sys.executable, "-m", "bigtrain", *words),
            cwd=self.folder,
            environment={"XDG_STATE_HOME": str(self.folder / "state")},
            check=check,
            timeout_s=120,
        )

    def submit(self, *words: str) -> Run:
        told = self.bigtrain("launch", "run.yaml", "--slurm", *words).stdout
        self.job_id = told.split()[1].rstrip(",")
        return self

    def ended(self, *states: str, timeout_s: float = 180.0) -> dict[str, str]:
        try:
            return self.bed.wait_for(self.job_id, *states, timeout_s=timeout_s)
        except AssertionError as error:
            logs = sorted((self.folder / "out").glob("logs/*/*/*.log"))
            texts = [f"{path}:\n{path.read_text()[-3000:]}" for path in logs]
            raise AssertionError("\n".join([str(error), self.text(), *texts])) from error

    def text(self) -> str:
        logs = sorted((self.folder / "out").glob("slurm-*.out"))
        return "".join(path.read_text() for path in logs)

    def alarming(self, told: str) -> list[str]:
        """Lines of `told`, and of every file that the run has left in its logs."""
        logs = (path.read_text() for path in (self.folder / "out" / "logs").glob("*/*/*.log"))
        lines = "\n".join([told, *logs]).splitlines()
        return [line for line in lines if ALARMING.search(line)]

    def losses(self) -> dict[int, float]:
        """Step → loss, of the attempt that logged the step last."""
        found = {}
        for path in sorted((self.folder / "out").glob("logs/attempt-*/node-000-*/metrics.jsonl")):
            for line in path.read_text().splitlines():
                entry = json.loads(line)
                if "loss" in entry:
                    found[entry["step"]] = entry["loss"]
        return found

    def wait_for_step(self, step: int, *, timeout_s: float = 120.0) -> None:
        limit = time.monotonic() + timeout_s
        while max(self.losses(), default=0) < step:
            assert time.monotonic() < limit, self.text()
            time.sleep(0.1)

    def pids(self, attempt: int = 1) -> dict[int, int]:
        """Rank → process, as the agents wrote it down."""
        found = {}
        for path in (self.folder / "out").glob(f"logs/attempt-{attempt:02d}/*/agent.log"):
            for rank, pid in re.findall(r"rank (\d+) is pid (\d+)", path.read_text()):
                found[int(rank)] = int(pid)
        return found


@pytest.fixture
def run(bed: Testbed, tmp_path: Path) -> Run:
    return _run(bed, tmp_path)


def _run(bed: Testbed, folder: Path) -> Run:
    folder.mkdir(exist_ok=True)
    (folder / "run.yaml").write_text(RUN_FILE)
    return Run(bed=bed, folder=folder)


def _long(*more: str) -> list[str]:
    """Enough steps to be interrupted."""
    return ["--set", "training.max_steps=40", "--set", "training.save_steps=5", *more]


def _closest(found: dict[int, float], expected: dict[int, float]) -> None:
    assert found.keys() == expected.keys()
    for step, loss in expected.items():
        assert found[step] == pytest.approx(loss, rel=1e-6), f"step {step}"


@pytest.mark.parametrize(
    "engine",
    ["fsdp", *(pytest.param(name, marks=pytest.mark.slow) for name in ("ddp", "zero2", "zero3"))],
)
def test_four_nodes_train_from_one_command_without_an_alarming_line(run: Run, engine: str) -> None:
    run.submit("--engine", engine)
    assert run.ended("COMPLETED")["ExitCode"] == "0:0"
    text = run.text()
    told = text + run.bigtrain("logs", run.job_id).stdout
    assert run.alarming(told) == []
    assert text.startswith("4 nodes met at 10.")
    assert "step 6/6" in text
    assert (run.folder / "out" / "model.safetensors").is_file()
    (listed,) = json.loads(run.bigtrain("jobs", "--ended", "--json").stdout)
    assert (listed["state"], listed["last_step"]) == ("COMPLETED", 6)
    logs = run.bigtrain("logs", run.job_id, "--node", "node2", "--grep", "exit code").stdout
    assert re.fullmatch(r"\[node2:agent\] \S+ \S+ the run ended with exit code 0\n", logs)


@pytest.mark.slow
def test_a_run_that_was_requeued_ends_with_the_losses_of_an_undisturbed_one(
    bed: Testbed, tmp_path: Path
) -> None:
    calm = _run(bed, tmp_path / "calm").submit(*_long())
    calm.ended("COMPLETED")
    run = _run(bed, tmp_path / "requeued").submit(*_long())
    run.wait_for_step(8)
    bed.run("scontrol", "requeue", run.job_id)
    run.ended("COMPLETED")
    assert bed.job(run.job_id)["Restarts"] == "1"
    assert re.search(r"going on from .*checkpoint-\d+", run.text()), run.text()
    _closest(run.losses(), calm.losses())
    weights = [r.folder / "out" / "model.safetensors" for r in (calm, run)]
    assert weights[0].read_bytes() == weights[1].read_bytes()


@pytest.mark.slow
def test_a_time_limit_ahead_makes_it_save_leave_with_85_and_resume_by_itself(run: Run) -> None:
    # Slurm gives its notice up to 30 s early: here 40 s after the start, or a little later.
    run.submit("--set", "training.max_steps=9000", "--set", "training.save_steps=9000",
               "--time", "3:00", "--signal", "USR2@110")  # fmt: skip
    run.wait_for_step(1)
    run.ended("PENDING", timeout_s=120)
    assert "going on in a new start of job" in run.text()
    saved = sorted((run.folder / "out").glob("checkpoint-*"))
    assert len(saved) == 1
    assert max(run.losses()) == int(saved[0].name.partition("-")[2])
    run.ended("RUNNING", timeout_s=90)
    run.wait_for_step(max(run.losses()) + 1, timeout_s=60)
    assert f"{saved[0].name}" in run.text().partition("new start")[2]
    run.bigtrain("cancel", "tiny")
    run.ended("CANCELLED")


@pytest.mark.slow
def test_a_run_in_a_job_that_asks_for_no_notice_gives_it_to_itself(run: Run) -> None:
    steps = "--set training.max_steps=9000 --set training.save_steps=9000"
    command = f"srun {sys.executable} -m bigtrain launch run.yaml --procs-per-node 1 {steps}"
    script = run.folder / "own.sbatch"
    script.write_text(OTHER_WAYS.format(command=command).replace("per-node=2", "per-node=1"))
    words = ("sbatch", "--parsable", "--time=2:00", script)
    run.job_id = run.bed.run(*words, cwd=run.folder).stdout.strip()
    run.wait_for_step(1)
    assert run.ended("FAILED", timeout_s=110)["ExitCode"] == "85:0"  # half of its time is over
    text = (run.folder / "own.out").read_text()
    assert re.search(r"the time limit is \d+ s away: saving\n", text), text
    (saved,) = (run.folder / "out").glob("checkpoint-*")
    assert saved.name == f"checkpoint-{max(run.losses())}"


@pytest.mark.slow
def test_what_is_cancelled_saves_ends_as_cancelled_and_stays_so(run: Run) -> None:
    run.submit("--set", "training.max_steps=2000", "--set", "training.save_steps=1000")
    run.wait_for_step(3)
    assert run.bigtrain("cancel", run.job_id).stdout == f"job {run.job_id} is told to end\n"
    run.ended("CANCELLED")
    time.sleep(3)
    job = run.bed.job(run.job_id)
    assert (job["JobState"], job["Restarts"]) == ("CANCELLED", "0")
    assert len(list((run.folder / "out").glob("checkpoint-*"))) == 1


@pytest.mark.slow
def test_a_rank_that_is_killed_ends_the_job_within_seconds_and_is_named(run: Run) -> None:
    run.submit("--set", "training.max_steps=2000")
    run.wait_for_step(3)
    os.kill(run.pids()[2], signal.SIGKILL)
    killed = time.monotonic()
    assert run.ended("FAILED")["ExitCode"] == "137:0"
    assert time.monotonic() - killed < 45  # not the 300 s for which the others would wait
    assert run.text().count("rank 2 on node2 was killed by SIGKILL") == 1


@pytest.mark.slow
@pytest.mark.parametrize("how", ["link", "slurmd"])
def test_a_lost_node_is_named_and_the_run_goes_on_from_the_last_checkpoint(
    own_bed: Testbed, tmp_path: Path, how: str
) -> None:
    steps = ("--set", "training.max_steps=4000", "--set", "training.save_steps=5")
    run = _run(own_bed, tmp_path).submit("--nodes", "3", *steps)
    run.wait_for_step(7)
    lose: Callable[[], Any] = {
        "link": lambda: own_bed.set_link(1, up=False),
        "slurmd": lambda: own_bed.kill_daemon(1),
    }[how]
    lose()
    run.ended("PENDING", timeout_s=120)
    if how == "link":
        assert run.text().count("node1 vanished") == 1
    saved = max(int(path.name[11:]) for path in (run.folder / "out").glob("checkpoint-*"))
    assert max(run.losses()) - saved <= 10  # two saves may be on their way
    run.ended("RUNNING", timeout_s=120)  # on the node that was spare
    run.wait_for_step(max(run.losses()) + 1)
    assert re.search(rf"going on from .*checkpoint-{saved}\n", run.text()), run.text()
    run.bigtrain("cancel", "tiny")


@pytest.mark.slow
@pytest.mark.parametrize("how", ["link", "agent"])
def test_with_a_spare_node_the_run_goes_on_and_ends_within_the_allocation(
    own_bed: Testbed, tmp_path: Path, how: str
) -> None:
    steps = ("--set", "training.max_steps=1000", "--set", "training.save_steps=5")
    run = _run(own_bed, tmp_path).submit("--nodes", "3", "--sbatch", "spare_nodes=1", *steps)
    run.wait_for_step(7)
    lose: Callable[[], Any] = {
        "link": lambda: own_bed.set_link(1, up=False),
        "agent": lambda: os.kill(_agent(run, "node1"), signal.SIGKILL),
    }[how]
    lose()
    run.ended("COMPLETED", timeout_s=240)
    text = run.text()
    assert own_bed.job(run.job_id)["Restarts"] == "0"
    assert "4 nodes met at" in text and "1 of them spare" in text
    assert text.count("node1 vanished") == 1
    (going_on,) = re.findall(r"going on without node1, with node3\n", text)
    assert re.search(r"going on from .*checkpoint-\d+", text.partition(going_on)[2]), text
    assert "step 1000/1000" in text
    hosts = {path.name for path in (tmp_path / "out" / "logs" / "attempt-02").iterdir()}
    assert hosts == {"node-000-node0", "node-001-node3", "node-002-node2"}


def _agent(run: Run, host: str) -> int:
    (log,) = (run.folder / "out").glob(f"logs/attempt-01/*-{host}/agent.log")
    (server,) = re.findall(r"fork server is pid (\d+)", log.read_text())
    stat = Path(f"/proc/{server}/stat").read_text()
    return int(stat.rpartition(")")[2].split()[1])


OTHER_WAYS = """\
#!/bin/bash
#SBATCH --nodes=2 --ntasks-per-node=2 --output=own.out
{command}
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    [
        "srun --ntasks-per-node=1 {bigtrain} launch run.yaml --procs-per-node 2",
        "srun {bigtrain} launch run.yaml",
        "srun {python} -m bigtrain.worker run.yaml",
    ],
)
def test_an_own_batch_script_trains_with_a_task_per_node_or_per_rank(
    run: Run, command: str
) -> None:
    words = {"bigtrain": f"{sys.executable} -m bigtrain", "python": sys.executable}
    script = run.folder / "own.sbatch"
    script.write_text(OTHER_WAYS.format(command=command.format(**words)))
    done = run.bed.run("sbatch", "--wait", script, cwd=run.folder, check=False, timeout_s=120)
    text = (run.folder / "own.out").read_text()
    assert done.returncode == 0, text
    assert "fsdp on 4 × cpu" in text
    assert (run.folder / "out" / "checkpoint-6" / "manifest.json").is_file()
    assert (run.folder / "out" / "plans" / "attempt-01.json").is_file()


BY_HAND = ("-m", "bigtrain", "launch", "run.yaml", "--procs-per-node", "1", "--rdzv-endpoint")
TORCHRUN = ("-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "2")
WORKER = ("--master-port", "29402", "-m", "bigtrain.worker", "run.yaml")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "world"),
    [
        ((*BY_HAND, "{head}:29400", "--nodes", "2", "--node-rank", "{node}"), 2),
        ((*BY_HAND, "[{head6}]:29404", "--nodes", "2", "--node-rank", "{node}"), 2),
        ((*BY_HAND, "{head}:29401", "--nodes", "2:4"), 2),
        ((*BY_HAND, "[{head6}]:29405", "--nodes", "2:4"), 2),
        ((*TORCHRUN, "--node-rank", "{node}", "--master-addr", "{head}", *WORKER), 4),
    ],
    ids=["by hand", "IPv6", "elastic", "elastic, IPv6", "torchrun"],
)
def test_machines_without_slurm_train_together(
    run: Run, command: tuple[str, ...], world: int, request: pytest.FixtureRequest
) -> None:
    """The testbed's nodes again, but as machines on which somebody types the command."""
    if "IPv6" in request.node.callspec.id and not Path("/proc/net/if_inet6").exists():
        pytest.skip("this machine has no IPv6")
    started = [_type_on(run, node, command) for node in range(2)]
    texts = [process.communicate(timeout=180)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0], "\n".join(texts)
    assert run.alarming("\n".join(texts)) == []
    assert f"fsdp on {world} × cpu" in "".join(texts)
    assert (run.folder / "out" / "checkpoint-6" / "manifest.json").is_file()
    ranks = {path.name for path in (run.folder / "out").glob("logs/attempt-01/node-*/rank-*.log")}
    assert ranks == {f"rank-{rank:05d}.log" for rank in range(world)}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("odd", "port", "said"),
    [
        ("export PYTHONPATH=$PWD/odd", 29406, "versions differ; install the same everywhere"),
        ("mkdir -p out; mount -t tmpfs none out", 29407, "node1 can't see what node0 wrote there"),
    ],
    ids=["version", "storage"],
)
def test_nodes_of_another_launchers_ranks_are_compared_and_refused_in_one_message(
    run: Run, odd: str, port: int, said: str
) -> None:
    package = run.folder / "odd" / "transformers-1.0.dist-info"
    package.mkdir(parents=True)
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: transformers\nVersion: 1.0\n")
    meeting = ("--master-addr", run.bed.address(0), "--master-port", str(port))
    started = []
    for node in range(2):
        rank = ("--node-rank", str(node), "-m", "bigtrain.worker", "run.yaml")
        words = " ".join((sys.executable, *TORCHRUN, *meeting, *rank))
        script = f"{odd if node else 'true'}; exec {words}"
        started.append(run.bed.popen_on(node, "bash", "-c", script, cwd=run.folder))
    texts = [process.communicate(timeout=180)[0] for process in started]
    assert 0 not in [process.returncode for process in started]
    assert "".join(texts).count(said) == 1, "\n".join(texts)
    assert list((run.folder / "out").glob("checkpoint-*")) == []


@pytest.mark.slow
def test_an_elastic_run_goes_on_with_the_machines_that_are_left(run: Run) -> None:
    steps = ("--set", "training.max_steps=300", "--set", "training.save_steps=5")
    command = (*BY_HAND, "{head}:29403", "--nodes", "2:4", *steps)
    started = [_type_on(run, node, command) for node in range(3)]
    run.wait_for_step(7)
    started[2].terminate()
    texts = [process.communicate(timeout=240)[0] for process in started]
    assert [process.returncode for process in started[:2]] == [0, 0], "\n".join(texts)
    assert re.search(r"fsdp on 3 × cpu.*going on from .*checkpoint-\d+", "".join(texts), re.S)
    assert "fsdp on 2 × cpu" in "".join(texts)
    assert (run.folder / "out" / "checkpoint-300" / "manifest.json").is_file()


@pytest.mark.slow
def test_nodes_with_disks_of_their_own_come_back_to_them_and_miss_one_by_name(run: Run) -> None:
    own_disk = "mkdir -p out disk{disk}; mount --bind disk{disk} out; exec {python} "
    by_hand = "{words} {head}:{port} --nodes 2 --node-rank {node} "
    each = "--set training.save_on_each_node=true --set training.max_steps="

    def start(port: int, steps: int, disks: tuple[int, int]) -> list[tuple[int, str]]:
        text = own_disk + by_hand + each + str(steps)
        fields = {"python": sys.executable, "words": " ".join(BY_HAND), "port": str(port)}
        fields["head"] = run.bed.address(0)
        processes = [
            run.bed.popen_on(
                node, "bash", "-c", text.format(disk=disk, node=node, **fields), cwd=run.folder
            )
            for node, disk in enumerate(disks)
        ]
        texts = [process.communicate(timeout=180)[0] for process in processes]
        return [(p.returncode, text) for p, text in zip(processes, texts, strict=True)]

    for code, text in start(29410, 6, (0, 1)):
        assert code == 0, text
    for disk in (0, 1):
        assert (run.folder / f"disk{disk}" / "checkpoint-6" / "manifest.json").is_file()
    first, second = start(29411, 9, (0, 1))
    assert (first[0], second[0]) == (0, 0), first[1] + second[1]
    assert re.search(r"going on from .*checkpoint-6\n", first[1]), first[1]
    first, second = start(29412, 12, (0, 2))
    assert first[0] != 0 and second[0] != 0
    assert re.search(r"node1.*rank", first[1] + second[1]), first[1] + second[1]


def _type_on(run: Run, node: int, command: tuple[str, ...]) -> subprocess.Popen[str]:
    places = {"head": run.bed.address(0), "head6": run.bed.address6(0)}
    words = [word.format(node=node, **places) for word in command]
    return run.bed.popen_on(node, sys.executable, *words, cwd=run.folder)
