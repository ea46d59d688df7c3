"""Scripts as jobs on the testbed: what several test files start, and how they look at it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from slurm_plans import make_plan

from bigtrain.plan import RunPlan
from bigtrain.share import bundled_file
from bigtrain.slurm.settings import read_settings
from bigtrain.slurm.submit import submit

if TYPE_CHECKING:
    from slurm_testbed import Testbed

ALARMING = ("error", "warning", "Traceback", "Terminat", "CANCELLED", "Broken pipe", "Killed")

# A program whose ranks meet, and one that needs no torch and so starts at once.
COLLECTIVE = """\
import os, torch, torch.distributed as dist
dist.init_process_group("gloo")
total = torch.ones(1)
dist.all_reduce(total)
if dist.get_rank() == 0:
    print("sum", int(total), "gpus", os.environ.get("CUDA_VISIBLE_DEVICES"))
dist.destroy_process_group()
"""
PLAIN = """\
import os, signal, sys, time
rank, mode, marks = int(os.environ["RANK"]), sys.argv[1], sys.argv[2]
restarted = int(os.environ.get("SLURM_RESTART_COUNT", "0")) > 0
def leave(number, frame):
    sys.exit(143 if number == signal.SIGTERM else 85)
for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
    signal.signal(number, leave)
open(f"{marks}/started-{rank}-{int(restarted)}", "w").close()
if mode == "fail" and rank == 1:
    raise ValueError("broken on purpose")
if mode == "stay" or (mode == "wait" and not restarted):
    time.sleep(300)
"""


@dataclass
class Run:
    """One submitted job."""

    bed: Testbed
    plan: RunPlan
    job_id: str
    log: Path
    state_home: Path

    @property
    def environment(self) -> Mapping[str, str]:
        return {"XDG_STATE_HOME": str(self.state_home)}

    def ended(self, *states: str, timeout_s: float = 150.0) -> dict[str, str]:
        try:
            return self.bed.wait_for(self.job_id, *states, timeout_s=timeout_s)
        except AssertionError as error:
            logs = sorted(Path(self.plan.output_dir).glob("logs/*/*/agent.log"))
            texts = [f"{path}:\n{path.read_text()}" for path in logs]
            raise AssertionError("\n".join([str(error), self.text(), *texts])) from error

    def text(self) -> str:
        return self.log.read_text()

    def wait_for_ranks(self, *, restarted: bool = False, timeout_s: float = 120.0) -> None:
        """Until every rank has begun."""
        limit = time.monotonic() + timeout_s
        names = [f"started-{k}-{int(restarted)}" for k in range(self.plan.topology.world_size)]
        while not all((Path(self.plan.working_dir) / name).exists() for name in names):
            assert time.monotonic() < limit, self.text() if self.log.exists() else "no log"
            time.sleep(0.1)


def starter(bed: Testbed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Run]:
    """Submits a script: `start(text, *args, nodes=, section=, wrapper=, **plan fields)`."""
    for name, value in bed.environment.items():
        monkeypatch.setenv(name, value)

    def submit_script(
        text: str,
        *args: str,
        nodes: int = 3,
        section: Mapping[str, Any] | None = None,
        wrapper: str | None = None,
        **fields: Any,
    ) -> Run:
        (tmp_path / "train.py").write_text(text)
        plan = make_plan(
            output_dir=tmp_path / "out",
            source=tmp_path / "train.py",
            script_args=(*args, str(tmp_path)),
            nodes=nodes,
            **{"preload": (), **fields},
        )
        whole = {"gres": "gpu:2", "cpus_per_task": 2, **(section or {})}
        if wrapper is not None:
            whole["template"] = _template_with(wrapper, tmp_path)
        environment = {"XDG_STATE_HOME": str(tmp_path / "state")}
        taken = submit(plan, settings=read_settings(whole), environment=environment)
        return Run(
            bed=bed,
            plan=plan,
            job_id=taken.job_id,
            log=Path(taken.log),
            state_home=tmp_path / "state",
        )

    return submit_script


def _template_with(wrapper: str, folder: Path) -> str:
    """The template, with every node's command run by a bash script of the test's."""
    (folder / "wrapper.sh").write_text(f'{wrapper}\nexec "$@"\n')
    text = bundled_file("slurm/train.sbatch").read_text()
    path = folder / "template.sbatch"
    path.write_text(
        text.replace('"${node_command[@]}"', f'bash {folder}/wrapper.sh "${{node_command[@]}}"')
    )
    return str(path)


def alarming(text: str) -> list[str]:
    return [line for line in text.splitlines() if any(word in line for word in ALARMING)]


def agents(run: Run) -> dict[int, int]:
    """Node rank → pid of the run's agents that are alive."""
    found = {}
    for entry in Path("/proc").iterdir():
        try:
            command = (entry / "cmdline").read_bytes()
            environment = (entry / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if b"slurm.node" not in command or run.plan.output_dir.encode() not in command:
            continue
        ranks = [v[13:] for v in environment if v.startswith(b"SLURM_NODEID=")]
        if ranks and b"srun" not in command.split(b"\0")[0]:
            found[int(ranks[0])] = int(entry.name)
    return found


def agent_of(run: Run, *, node: int) -> int:
    return agents(run)[node]
