"""Scripts that know nothing of bigtrain run on the planned engine, unchanged."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

_SCRIPTS = Path(__file__).parent.parent / "scripts"
_KINDS = {"ddp": "MULTI_CPU", "fsdp": "FSDP", "zero1": "DEEPSPEED", "zero3": "DEEPSPEED"}


def _launch(
    script: str, engine: str, folder: Path, *more: str, procs: int = 2, said: Sequence[str] = ()
) -> list[dict[str, Any]]:
    """What each of `procs` ranks wrote down of its training; `said` to the script."""
    folder.mkdir(parents=True)
    command = [sys.executable, "-m", "bigtrain", "launch", str(_SCRIPTS / script)]
    command += ["--engine", engine, "--procs-per-node", str(procs)]
    command += ["--output-dir", str(folder / "logs")]
    done = subprocess.run(
        [*command, *more, "--", str(folder), *said],
        capture_output=True,
        text=True,
        env=dict(os.environ),
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(procs)]


@pytest.mark.parametrize("start", ["fork", pytest.param("fresh", marks=pytest.mark.slow)])
@pytest.mark.parametrize("script", ["transformers_trainer.py", "accelerate_loop.py"])
def test_zero3_and_fsdp2_train_as_ddp_does(script: str, start: str, tmp_path: Path) -> None:
    ran = {
        engine: _launch(script, engine, tmp_path / engine, "--start", start)
        for engine in (("ddp", "fsdp", "zero3") if start == "fork" else ("ddp", "fsdp"))
    }

    for engine, ranks in ran.items():
        for seen in ranks:
            assert seen["world"] == 2
            assert seen["kind"] == f"DistributedType.{_KINDS[engine]}"
            assert seen["is_cut"] == (engine != "ddp")
        assert ranks[0]["losses"] == pytest.approx(ran["ddp"][0]["losses"], rel=1e-4)


@pytest.mark.parametrize(
    ("script", "engine", "procs"),
    [
        ("transformers_trainer.py", "zero1", 2),
        ("transformers_trainer.py", "zero3", 1),
        ("transformers_trainer.py", "fsdp", 2),
        ("accelerate_loop.py", "fsdp", 2),
    ],
)
def test_a_script_that_asks_for_the_cpu_keeps_the_planned_engine(
    script: str, engine: str, procs: int, tmp_path: Path
) -> None:
    ranks = _launch(script, engine, tmp_path / "run", procs=procs, said=["--use_cpu"])

    for seen in ranks:
        assert seen["world"] == procs
        assert seen["kind"] == f"DistributedType.{_KINDS[engine]}"
        assert seen["is_cut"] == (engine != "zero1")


def test_an_accelerate_config_chooses_engine_and_processes(tmp_path: Path) -> None:
    (tmp_path / "accelerate.yaml").write_text(
        "distributed_type: FSDP\n"
        "num_processes: 2\n"
        "num_machines: 1\n"
        "use_cpu: true\n"
        "fsdp_config:\n"
        "  fsdp_version: 1\n"
        "  fsdp_sharding_strategy: SHARD_GRAD_OP\n"
    )
    command = [sys.executable, "-m", "bigtrain", "plan", str(_SCRIPTS / "accelerate_loop.py")]
    done = subprocess.run(
        [*command, "--accelerate-config", "accelerate.yaml", "--json"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(_SCRIPTS.parent.parent)},
        check=True,
    )

    plan = json.loads(done.stdout)
    assert plan["engine"]["name"] == "fsdp"
    assert plan["topology"]["procs_per_node"] == 2
    assert plan["environment"]["ACCELERATE_USE_FSDP"] == "true"
    assert plan["environment"]["FSDP_RESHARD_AFTER_FORWARD"] == "false"
