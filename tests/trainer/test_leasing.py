"""Two runs don't train into one output directory at the same time."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerCallback

from bigtrain.checkpoint import lease
from bigtrain.errors import CheckpointError
from bigtrain.topology import RankInfo
from tests.engine import harness
from tests.trainer.samples import Sentences, trainer

IN_USE = "is being written to by another run"


class Hand(TrainerCallback):
    """Tells that a step was done, and waits to be told to go on."""

    def __init__(self, *, told: int, told_by: int) -> None:
        self.told, self.told_by = told, told_by

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 1:
            os.write(self.told, b"x")
            os.read(self.told_by, 1)


def run(folder: Path, **changed: Any) -> Any:
    fields = {"max_steps": 3, "save_strategy": "steps", "save_steps": 2} | changed
    return trainer(folder, data=Sentences(60), gradient_accumulation_steps=1, **fields)


def outcome(world: RankInfo, folder: Path) -> str:
    try:
        run(folder).train()
    except CheckpointError as fault:
        return str(fault)
    return ""


def test_a_second_training_is_refused_on_all_its_ranks_and_the_first_goes_on(
    tmp_path: Path,
) -> None:
    (began, tell), (hear, end) = os.pipe(), os.pipe()
    if (pid := os.fork()) == 0:
        code = 1
        try:
            run(tmp_path, callbacks=[Hand(told=tell, told_by=hear)]).train()
            code = 0
        finally:
            os._exit(code)
    assert os.read(began, 1) == b"x"
    for said in harness.run_ranks(2, outcome, tmp_path):
        assert f"{tmp_path} {IN_USE} (process {pid} on " in said
    os.write(end, b"x")
    assert os.waitpid(pid, 0)[1] == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-2", "checkpoint-3"]
    assert harness.run_ranks(1, outcome, tmp_path) == [""]


@pytest.mark.parametrize("event", ["on_train_begin", "on_step_end", "on_save", "on_train_end"])
@pytest.mark.parametrize("fault", [ValueError, KeyboardInterrupt, SystemExit])
def test_a_training_that_ends_in_an_exception_leaves_no_lease(
    tmp_path: Path, event: str, fault: type[BaseException]
) -> None:
    class Failing(TrainerCallback):
        seen = False

    def fail(*args: Any, **kwargs: Any) -> None:
        Failing.seen = (tmp_path / lease.LEASE).is_dir()
        raise fault

    setattr(Failing, event, fail)
    with pytest.raises(fault):
        run(tmp_path, callbacks=[Failing()]).train()
    assert Failing.seen
    assert not [path.name for path in tmp_path.iterdir() if lease.LEASE in path.name]


def test_a_training_that_is_taken_over_saves_no_more(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class TakenOver(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 1:
                shutil.rmtree(tmp_path / lease.LEASE)
                lease.take(tmp_path)

    with pytest.raises(CheckpointError, match="was taken over by process"):
        run(tmp_path, callbacks=[TakenOver()]).train()
    assert [p.name for p in tmp_path.iterdir()] == [lease.LEASE]


def test_a_directory_that_can_not_be_held_is_said_and_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(lease, "take", refuse)
    with caplog.at_level(logging.WARNING):
        run(tmp_path).train()
    assert f"{tmp_path} can't be held against other runs: no space left" in caplog.text
    assert (tmp_path / "checkpoint-3").is_dir()


def test_a_second_launch_is_refused_before_it_starts_anything(tmp_path: Path) -> None:
    hold = "import sys, time; from pathlib import Path; from bigtrain.checkpoint import lease\n"
    hold += "lease.take(Path(sys.argv[1])); print('held', flush=True); time.sleep(60)"
    holder = subprocess.Popen(
        [sys.executable, "-c", hold, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    holder.stdout.readline()
    command = [sys.executable, "-m", "bigtrain", "launch", "configs/quickstart.yaml"]
    done = subprocess.run(
        [*command, "--output-dir", str(tmp_path)], capture_output=True, text=True, check=False
    )
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    holder.stdout.close()
    assert done.returncode != 0
    assert f"output_dir: {tmp_path} {IN_USE} (process {holder.pid}" in done.stderr
    assert "Traceback" not in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == [lease.LEASE]
