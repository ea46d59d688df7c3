"""Whatever happens in the middle: never is a bad checkpoint loaded or a good one lost."""

from __future__ import annotations

import errno
import logging
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from bigtrain.checkpoint.find import find_checkpoint
from bigtrain.checkpoint.load import open_checkpoint
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
    save,
)

ALONE = RankInfo()
SHARDED = pytest.mark.parametrize("is_sharded", [False, True], ids=["whole", "sharded"])


def save_seed(output_dir: Path, *, step: int, seed: int, is_sharded: bool) -> Path:
    target = output_dir / f"checkpoint-{step}"
    save(target, StandIn(*make_state(seed), world=ALONE, is_sharded=is_sharded), step=step)
    return target


def assert_holds_seed(path: Path, *, seed: int, is_sharded: bool) -> None:
    engine = StandIn(*blank(make_state()), world=ALONE, is_sharded=is_sharded)
    with open_checkpoint(path) as checkpoint:
        engine.load_local_state(checkpoint.source, optimizer=True)
    expected = StandIn(*make_state(seed), world=ALONE, is_sharded=is_sharded)
    assert_same_local_state(engine, expected)


def in_child(action: Any) -> int:
    """The wait status of a child that does `action` and leaves."""
    pid = os.fork()
    if pid == 0:
        try:
            action()
            os._exit(0)
        except BaseException:
            os._exit(1)
    return os.waitpid(pid, 0)[1]


def kill_at_file_event(number: int) -> None:
    """Have this process killed at its `number`-th opening, making, renaming or removing."""
    left = [number]

    def hook(event: str, _: Any) -> None:
        if event in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link"):
            left[0] -= 1
            if left[0] < 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


@SHARDED
@pytest.mark.parametrize("again", [False, True], ids=["next", "same step"])
@pytest.mark.parametrize("every", [7, pytest.param(1, marks=pytest.mark.slow)])
def test_killed_at_any_file_boundary_the_newest_good_step_is_resumed(
    tmp_path: Path, is_sharded: bool, again: bool, every: int
) -> None:
    """Step 3 is there (seed 0); killed while saving step 4, or step 3 once more (seed 1)."""
    step = 3 if again else 4
    events = 0
    while True:
        output_dir = tmp_path / str(events)
        save_seed(output_dir, step=3, seed=0, is_sharded=is_sharded)

        def saving(output_dir: Path = output_dir, number: int = events) -> None:
            kill_at_file_event(number)
            save_seed(output_dir, step=step, seed=1, is_sharded=is_sharded)

        status = in_child(saving)
        found = find_checkpoint(output_dir, run_id="run", deep=True)
        assert found.path is not None and not found.passed_over
        is_new = (output_dir / f"checkpoint-{step}").exists() and found.path.name.endswith(
            f"-{step}"
        )
        if again:
            # Either the old or the new one of this step, and that one whole.
            content = verify_checkpoint(found.path).manifest.uuid
            old = [seed for seed in (0, 1) if _holds(found.path, seed, is_sharded)]
            assert len(old) == 1, content
        else:
            assert_holds_seed(found.path, seed=1 if is_new else 0, is_sharded=is_sharded)
        save_seed(output_dir, step=5, seed=2, is_sharded=is_sharded)
        assert {path.name for path in output_dir.iterdir()} <= {
            f"checkpoint-{n}" for n in (3, 4, 5)
        }
        if os.WIFEXITED(status):
            assert os.WEXITSTATUS(status) == 0 and events > 20
            return
        events += every


def _holds(path: Path, seed: int, is_sharded: bool) -> bool:
    try:
        assert_holds_seed(path, seed=seed, is_sharded=is_sharded)
    except AssertionError:
        return False
    return True


@SHARDED
def test_a_flipped_bit_in_any_file_is_refused_or_harmless(tmp_path: Path, is_sharded: bool) -> None:
    target = save_seed(tmp_path, step=3, seed=0, is_sharded=is_sharded)
    files = sorted(path for path in target.rglob("*") if path.is_file())
    assert len(files) >= 8
    for path in files:
        whole = path.read_bytes()
        for position in {0, len(whole) // 3, len(whole) // 2, len(whole) - 1}:
            flipped = bytearray(whole)
            flipped[position] ^= 16
            path.write_bytes(flipped)
            assert find_checkpoint(tmp_path, run_id="run").path is None, (path, position)
            if path.name != "config.json":
                with pytest.raises(CheckpointError, match=str(path)):
                    open_checkpoint(path=target)
        path.write_bytes(whole)
    verify_checkpoint(target, deep=True)


@SHARDED
def test_a_file_cut_off_or_missing_is_refused(tmp_path: Path, is_sharded: bool) -> None:
    target = save_seed(tmp_path, step=3, seed=0, is_sharded=is_sharded)
    for path in sorted(path for path in target.rglob("*") if path.is_file()):
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
        assert find_checkpoint(tmp_path).path is None, path
        path.unlink()
        assert find_checkpoint(tmp_path).path is None, path
        path.write_bytes(whole)
    assert find_checkpoint(tmp_path, deep=True).path == target


def test_the_manifest_of_another_step_is_refused(tmp_path: Path) -> None:
    first = save_seed(tmp_path, step=3, seed=0, is_sharded=True)
    second = save_seed(tmp_path, step=4, seed=1, is_sharded=True)
    (second / "manifest.json").write_bytes((first / "manifest.json").read_bytes())
    assert find_checkpoint(tmp_path).path == first


def test_a_bit_flipped_in_a_large_file_is_found_when_it_is_read(tmp_path: Path) -> None:
    import torch
    from torch import nn

    model = nn.Linear(1500, 1500)
    optimizer = torch.optim.AdamW(model.parameters())
    engine = StandIn(model, optimizer, world=ALONE, is_sharded=True)
    save(tmp_path / "checkpoint-3", engine)
    path = tmp_path / "checkpoint-3" / "weights" / "__0_0.distcp"
    data = bytearray(path.read_bytes())
    data[6_000_000] ^= 1
    path.write_bytes(data)
    assert find_checkpoint(tmp_path).path is not None
    assert find_checkpoint(tmp_path, deep=True).path is None
    with (
        open_checkpoint(tmp_path / "checkpoint-3") as checkpoint,
        pytest.raises(CheckpointError, match="bytes 4194304 to 8388608 are not those"),
    ):
        engine.load_local_state(checkpoint.source, optimizer=False)


def test_an_edited_config_only_warns_when_the_checkpoint_was_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    target = save_seed(tmp_path, step=3, seed=0, is_sharded=True)
    (target / "config.json").write_text('{"model_type": "edited"}')
    with caplog.at_level(logging.WARNING):
        assert_holds_seed(target, seed=0, is_sharded=True)
    assert "config.json: has 24 bytes, but 21 were written" in caplog.text


def test_a_disk_that_can_not_be_read_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    older = save_seed(tmp_path, step=3, seed=0, is_sharded=True)
    newest = save_seed(tmp_path, step=4, seed=1, is_sharded=True)
    broken = {(newest / "scheduler.pt").stat().st_ino}
    real = os.preadv

    def preadv(fd: int, buffers: Any, offset: int) -> int:
        if os.fstat(fd).st_ino in broken:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", preadv)
    found = find_checkpoint(tmp_path)
    assert found.path == older
    assert [path for path, _ in found.passed_over] == [newest]
    assert "scheduler.pt: can't be read at byte 0: Input/output error" in found.passed_over[0][1]


def fail_on(world: RankInfo, target: Path, failing: int) -> str:
    engine = StandIn(*make_state(), world=world, is_sharded=True)
    files = ModelFiles(engine)

    def write(staging: Path) -> None:
        files(staging)
        if failing == 0:
            raise OSError(5, "Input/output error")
        (staging / "weights" / f"__{failing}_0.distcp").mkdir(parents=True)

    try:
        save(target, engine, write_files=write, step=4)
    except CheckpointError as fault:
        return str(fault)
    return "saved"


@pytest.mark.parametrize("failing", [0, 1])
def test_a_failure_of_one_rank_is_told_on_all_and_leaves_nothing(
    tmp_path: Path, failing: int
) -> None:
    save_seed(tmp_path, step=3, seed=0, is_sharded=True)
    messages = run_ranks(2, fail_on, tmp_path / "checkpoint-4", failing)
    assert messages[0] == messages[1]
    # Rank 1 races with the directory that rank 0 puts in its way, and may have been first.
    assert ("Input/output error" if failing == 0 else "exists") in messages[0]
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-3"]


def lose_rank_1(world: RankInfo, target: Path) -> str:
    if world.rank == 1:
        kill_at_file_event(2)
    try:
        save(target, StandIn(*make_state(), world=world, is_sharded=True), step=4)
    except Exception as fault:
        return type(fault).__name__
    return "saved"


def test_a_rank_that_is_killed_while_it_writes_leaves_nothing_and_nobody_waiting(
    tmp_path: Path,
) -> None:
    save_seed(tmp_path, step=3, seed=0, is_sharded=True)
    with pytest.raises(AssertionError, match=r"only ranks \[0\] finished"):
        run_ranks(2, lose_rank_1, tmp_path / "checkpoint-4")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-3"]


def test_an_output_directory_that_cannot_be_made_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    engine = StandIn(*make_state(), world=ALONE, is_sharded=True)
    with pytest.raises(CheckpointError, match="give an output directory that can be written to"):
        save(tmp_path / "file" / "checkpoint-1", engine)


@SHARDED
def test_a_disk_too_small_is_told_before_the_first_byte(small_disk: Path, is_sharded: bool) -> None:
    save_seed(small_disk, step=3, seed=0, is_sharded=is_sharded)
    free = os.statvfs(small_disk)
    (small_disk / "ballast").write_bytes(bytes(free.f_bavail * free.f_frsize - (40 << 10)))
    engine = StandIn(*make_state(), world=ALONE, is_sharded=is_sharded)
    called: list[Path] = []
    with pytest.raises(CheckpointError, match=r"no space for .*: it takes .* KB, .* KB are free"):
        save(small_disk / "checkpoint-4", engine, write_files=called.append)
    assert not called
    assert sorted(path.name for path in small_disk.iterdir()) == ["ballast", "checkpoint-3"]
    assert_holds_seed(small_disk / "checkpoint-3", seed=0, is_sharded=is_sharded)


@SHARDED
def test_a_disk_that_fills_anyway_loses_nothing(small_disk: Path, is_sharded: bool) -> None:
    """Someone else takes the space while we write, and leaves from nothing to nearly enough."""
    save_seed(small_disk, step=3, seed=0, is_sharded=is_sharded)
    engine = StandIn(*make_state(1), world=ALONE, is_sharded=is_sharded)
    files = ModelFiles(engine)
    saved = 0
    for left in range(0, 160 << 10, 8 << 10):

        def write(staging: Path, left: int = left) -> None:
            free = os.statvfs(small_disk)
            ballast = free.f_bavail * free.f_frsize - left
            (small_disk / "ballast").write_bytes(bytes(ballast))
            files(staging)

        try:
            save(small_disk / "checkpoint-4", engine, write_files=write, step=4)
            saved += 1
        except CheckpointError as fault:
            assert str(fault).startswith(f"no space for the checkpoint in {small_disk}: it takes ")
            assert not (small_disk / "checkpoint-4").exists()
        (small_disk / "ballast").unlink()
        names = {path.name for path in small_disk.iterdir()}
        assert names == {"checkpoint-3", "checkpoint-4"} if saved else {"checkpoint-3"}
        assert_holds_seed(small_disk / "checkpoint-3", seed=0, is_sharded=is_sharded)
        if saved:
            assert_holds_seed(small_disk / "checkpoint-4", seed=1, is_sharded=is_sharded)
            break
    assert saved, "the largest disk was too small for the test itself"
