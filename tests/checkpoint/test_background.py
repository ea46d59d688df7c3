"""Saving while training goes on: what was copied is what is committed, whatever happens."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from bigtrain.checkpoint.find import find_checkpoint
from bigtrain.checkpoint.load import open_checkpoint
from bigtrain.checkpoint.manifest import Progress
from bigtrain.checkpoint.save import FAILED, Saver, SaveRequest
from bigtrain.checkpoint.verify import verify_checkpoint
from bigtrain.errors import CheckpointError
from bigtrain.topology import RankInfo
from tests.checkpoint.stand_in import (
    ModelFiles,
    StandIn,
    assert_same_local_state,
    blank,
    make_state,
    run_ranks,
)

ALONE = RankInfo()


def request(target: Path, engine: StandIn, *, step: int = 3) -> SaveRequest:
    return SaveRequest(
        target=target,
        run_id="run",
        progress=Progress(step=step),
        scheduler_state={"last_epoch": step},
        rng_state={"cpu": torch.random.get_rng_state()},
        write_files=ModelFiles(engine),
    )


def children() -> set[int]:
    listed = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text()
    return {int(pid) for pid in listed.split()}


def save_twice_while_training(world: RankInfo, output_dir: Path, is_sharded: bool) -> list[int]:
    """The state is spoiled as soon as it may be; the second save reuses the first one's memory."""
    saver = Saver(world, in_background=True)
    statuses = []
    for step in (3, 4):
        engine = StandIn(*make_state(seed=step), world=world, is_sharded=is_sharded)
        saver.warm_up(engine)  # type: ignore[arg-type]
        saver.save(
            request(output_dir / f"checkpoint-{step}", engine, step=step), engine, wait=False
        )  # type: ignore[arg-type]
        blank((engine.model, engine.optimizer))  # type: ignore[arg-type]
        assert saver.in_flight is not None
    while not (status := saver.status()) and world.is_main:
        time.sleep(0.01)
    statuses.append(status)
    finished = saver.finish()
    assert finished is not None and finished.progress.step == 4 and saver.finish() is None
    saver.close()
    return statuses


@pytest.mark.parametrize(("world_size", "is_sharded"), [(1, False), (1, True), (3, True)])
def test_what_was_copied_is_committed_while_training_spoils_the_state(
    tmp_path: Path, world_size: int, is_sharded: bool
) -> None:
    statuses = run_ranks(world_size, save_twice_while_training, tmp_path, is_sharded)
    assert statuses[0] == [1]
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-3", "checkpoint-4"}
    for step in (3, 4):
        verify_checkpoint(tmp_path / f"checkpoint-{step}", deep=True)
        engine = StandIn(*blank(make_state()), world=ALONE, is_sharded=is_sharded)
        with open_checkpoint(tmp_path / f"checkpoint-{step}") as loaded:
            assert loaded.progress.step == step and loaded.world_size == world_size
            engine.load_local_state(loaded.source, optimizer=True)
        expected = StandIn(*make_state(seed=step), world=ALONE, is_sharded=is_sharded)
        assert_same_local_state(engine, expected)


def test_a_writer_that_is_killed_is_an_error_on_all_ranks_and_leaves_no_trace(
    tmp_path: Path,
) -> None:
    messages = run_ranks(2, stop_and_kill, tmp_path)
    assert messages[0] == messages[1]
    assert "the process that writes checkpoints was killed by SIGKILL" in messages[0]
    assert list(tmp_path.iterdir()) == []


def stop_and_kill(world: RankInfo, output_dir: Path) -> str:
    engine = StandIn(*make_state(), world=world, is_sharded=True)
    saver = Saver(world, in_background=True)
    before = children()
    saver.warm_up(engine)  # type: ignore[arg-type]
    (writer,) = children() - before
    if world.rank == 1:
        os.kill(writer, signal.SIGSTOP)
    saver.save(request(output_dir / "checkpoint-4", engine, step=4), engine, wait=False)  # type: ignore[arg-type]
    if world.rank == 1:
        os.kill(writer, signal.SIGKILL)
        while not saver.status():
            time.sleep(0.01)
        assert saver.status() == FAILED
    try:
        saver.finish()
    except CheckpointError as fault:
        return str(fault)
    finally:
        saver.close()
    return "saved"


def leave_at_once(world: RankInfo, output_dir: Path) -> None:
    """Signals for the whole group, and then the rank is killed with the save in flight."""
    engine = StandIn(*make_state(), world=world, is_sharded=True)
    saver = Saver(world, in_background=True)
    before = children()
    saver.warm_up(engine)  # type: ignore[arg-type]
    (writer,) = children() - before
    saver.save(request(output_dir / "checkpoint-4", engine, step=4), engine, wait=False)  # type: ignore[arg-type]
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP):
        os.kill(writer, number)
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_save_that_was_copied_is_committed_though_all_ranks_are_killed(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=r"only ranks \[\] finished"):
        run_ranks(2, leave_at_once, tmp_path)
    deadline = time.monotonic() + 30
    while find_checkpoint(tmp_path).path is None and time.monotonic() < deadline:
        time.sleep(0.05)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-4"]
    verify_checkpoint(tmp_path / "checkpoint-4", deep=True)


def test_the_writer_imports_no_torch() -> None:
    names = "torch", "numpy", "transformers"
    script = (
        f"import bigtrain.checkpoint.writer, sys; print([n for n in {names} if n in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_without_memory_for_a_copy_training_waits_and_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    from bigtrain.checkpoint import arena

    monkeypatch.setattr(arena, "available_bytes", lambda: 1 << 20)
    engine = StandIn(*make_state(), world=ALONE, is_sharded=True)
    saver = Saver(ALONE, in_background=True)
    saver.save(request(tmp_path / "checkpoint-3", engine), engine, wait=False)  # type: ignore[arg-type]
    assert saver.in_flight is None
    verify_checkpoint(tmp_path / "checkpoint-3", deep=True)
    assert "saving while training waits: no memory to copy the training state to" in caplog.text
    saver.close()
