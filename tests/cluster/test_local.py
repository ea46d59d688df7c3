"""What a launch says, where it writes, and what it refuses."""

from __future__ import annotations

import json
import os
import platform
import sys
from pathlib import Path
from typing import Any

import pytest

from bigtrain.cluster import environment, local
from bigtrain.cluster.environment import Place
from bigtrain.cluster.layout import NodeLogs
from bigtrain.console import PlainConsole
from bigtrain.errors import LaunchError, UnsupportedError
from bigtrain.plan import RunPlan
from bigtrain.topology import RankInfo, Topology
from bigtrain.translate.config import EngineConfig, SingleSettings


def _plan(tmp_path: Path, **fields: Any) -> RunPlan:
    defaults: dict[str, Any] = {
        "name": "test",
        "kind": "script",
        "source": str(tmp_path / "script.py"),
        "working_dir": str(tmp_path),
        "topology": Topology(procs_per_node=2),
        "device": "cpu",
        "engine": EngineConfig(name="single", settings=SingleSettings()),
        "output_dir": str(tmp_path / "run"),
    }
    return RunPlan(**{**defaults, **fields})


def test_describe_shows_the_command_of_every_rank_and_starts_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS")
    plan = _plan(tmp_path, script_args=("--name", "a b"), preload=("torch",), threads_per_rank=3)
    host = platform.node()
    assert local.describe(plan) == [
        f"test: 2 ranks on {host}, cpu, 3 threads each, start: fork",
        f"logs: {tmp_path}/run/logs/attempt-01/node-000-{host}",
        "imported once: torch",
        f"RANK=0 LOCAL_RANK=0 WORLD_SIZE=2 {sys.executable} {tmp_path}/script.py --name 'a b'",
        f"RANK=1 LOCAL_RANK=1 WORLD_SIZE=2 {sys.executable} {tmp_path}/script.py --name 'a b'",
    ]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("fields", "error", "words"),
    [
        ({}, LaunchError, "there is no script "),
        ({"kind": "run_file", "working_dir": "/no/where"}, LaunchError, "/no/where does not exist"),
        ({"topology": Topology(nodes=2)}, UnsupportedError, "the plan is for 2 nodes"),
    ],
)
def test_what_can_not_start_is_refused_before_anything_is_written(
    tmp_path: Path, fields: dict[str, Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        local.launch(
            _plan(tmp_path, **fields),
            tmp_path / "plan.json",
            console=PlainConsole(sys.stdout, sys.stderr),
        )
    assert list(tmp_path.iterdir()) == []


def test_a_ranks_variables_are_read_back_as_its_place_in_the_run(tmp_path: Path) -> None:
    plan = _plan(tmp_path, topology=Topology(nodes=2, procs_per_node=3))
    variables = environment.for_rank(
        plan,
        plan_path="plan.json",
        local_rank=1,
        place=Place(node_rank=1, store_host="10.0.0.1", store_port=4000),
        logs=NodeLogs(directory=tmp_path),
        restarts=2,
    )
    assert RankInfo.from_environment(variables) == RankInfo(
        rank=4, local_rank=1, node_rank=1, world_size=6, local_world_size=3, source="torchrun"
    )
    assert variables["BIGTRAIN_RESTART_COUNT"] == "2"


def test_nccls_flight_recorder_dumps_beside_the_logs_unless_told_otherwise(tmp_path: Path) -> None:
    plan, logs = _plan(tmp_path, device="cuda"), NodeLogs(directory=tmp_path)
    variables = environment.for_node(plan, inherited={"TORCH_NCCL_DUMP_ON_TIMEOUT": "0"}, logs=logs)
    assert variables["TORCH_FR_DUMP_TEMP_FILE"] == f"{tmp_path}/nccl-trace-rank-"
    assert variables["TORCH_FR_BUFFER_SIZE"] == "2000"
    assert variables["TORCH_NCCL_DUMP_ON_TIMEOUT"] == "0"
    on_cpu = environment.for_node(_plan(tmp_path), inherited={}, logs=logs)
    assert not any(name.startswith("TORCH_FR_") for name in on_cpu)


def test_the_plan_wins_over_the_shell_and_the_shell_over_defaults(tmp_path: Path) -> None:
    plan = _plan(tmp_path, threads_per_rank=4, environment={"BOTH": "plan"})
    assert environment.for_node(plan, inherited={})["OMP_NUM_THREADS"] == "4"
    variables = environment.for_node(plan, inherited={"OMP_NUM_THREADS": "2", "BOTH": "shell"})
    assert variables["OMP_NUM_THREADS"] == "2"
    assert variables["BOTH"] == "plan"


def test_a_hosts_name_can_not_lead_out_of_the_logs(tmp_path: Path) -> None:
    logs = NodeLogs.of(output_dir=str(tmp_path), attempt=3, node_rank=7, host="../a b")
    assert logs.directory == tmp_path / "logs" / "attempt-03" / "node-007-.._a_b"


def test_json_output_is_json_from_the_first_line_to_the_last(launcher: Any) -> None:
    done = launcher.run(
        """
        from bigtrain.cluster import events
        events.emit("progress", step=1, total=2, loss=float("nan"))
        print("hello")
        raise SystemExit(6)
        """,
        json=True,
    )
    assert done.code == 6
    records = [json.loads(line) for line in done.out.splitlines()]
    kinds = [record["kind"] for record in records]
    assert kinds[0] == "launcher"
    assert sorted(kinds[1:3]) == ["output", "progress"]
    assert kinds[3] == "failure"
    assert done.err == ""


def test_warnings_of_other_ranks_carry_their_place(launcher: Any) -> None:
    done = launcher.run(
        """
        import logging, os
        from bigtrain.cluster.events import EventHandler
        rank = int(os.environ["RANK"])
        logging.getLogger().addHandler(EventHandler(is_main=rank == 0))
        logging.getLogger().setLevel(logging.INFO)
        logging.info("calm")
        logging.warning("careful")
        """,
        procs=2,
        kind="script",
    )
    assert done.code == 0
    assert done.out == "calm\n"
    assert sorted(done.err.splitlines()[1:]) == ["[0:1] warning: careful", "warning: careful"]


def test_the_logs_lie_where_they_are_looked_for(launcher: Any, start: dict[str, Any]) -> None:
    done = launcher.run(
        "import os; print(os.environ['BIGTRAIN_LOG_DIR'], os.environ['BIGTRAIN_PLAN'])",
        attempt=12,
        **start,
    )
    folder = done.output_dir / "logs" / "attempt-12" / f"node-000-{os.uname().nodename}"
    assert done.out.split() == [str(folder), str(done.output_dir / "plan.json")]
    assert sorted(path.name for path in folder.iterdir()) == [
        "agent.log", "fork-server.log", "rank-00000.log", "store.log",
    ]  # fmt: skip
