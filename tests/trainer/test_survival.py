"""Whatever happens to a run or to its files: it goes on from the newest good step, exactly."""

from __future__ import annotations

import io
import logging
import os
import random
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from transformers import TrainerCallback

from bigtrain.checkpoint.staging import time_of_commit
from bigtrain.cluster.ending import how_to_go_on
from bigtrain.errors import CheckpointError
from bigtrain.plan import PLAN_VARIABLE, read_plan
from bigtrain.topology import RankInfo
from bigtrain.trainer.trainer import Trainer
from tests.engine import harness
from tests.trainer.samples import Sentences, losses, tiny_llama, trainer
from tests.trainer.test_stopping import make_plan

EVERY = 3
STEPS = 9


def run_of(folder: Path, **changed: Any) -> Trainer:
    fields = {
        "max_steps": STEPS,
        "save_strategy": "steps",
        "save_steps": EVERY,
        "gradient_accumulation_steps": 1,
    } | changed
    return trainer(folder, data=Sentences(60), **fields)


def resumed_from(run: Trainer) -> int:
    return int(run._initial_global_step)


def flip(content: bytes, place: int) -> bytes:
    flipped = bytearray(content)
    flipped[place] ^= 1
    return bytes(flipped)


def a_digit(content: bytes) -> int:
    """Where one is: with another in its place a text is as good as before."""
    return next(place for place, byte in enumerate(content) if chr(byte).isdigit())


DAMAGES: dict[str, Callable[[bytes], bytes | None]] = {
    "flipped": lambda content: flip(content, len(content) // 2),
    "a digit flipped": lambda content: flip(content, a_digit(content)),
    "cut off": lambda content: content[: len(content) // 2],
    "missing": lambda content: None,
}


def damaged_one_after_another(
    world: RankInfo, folder: Path, changed: dict[str, Any], damages: list[str]
) -> list[tuple[str, str, int, list[Any]]]:
    """Each file of the newest damaged in turn, each time gone on; what and how, from where, how."""
    newest = folder / f"checkpoint-{STEPS - EVERY}"
    files = sorted(path for path in newest.rglob("*") if path.is_file())
    found = []
    for path in files:
        content = path.read_bytes()
        for damage in damages:
            if "digit" in damage and path.suffix != ".json":
                continue
            barrier(world)
            if world.is_main:
                spoiled = DAMAGES[damage](content)
                path.unlink() if spoiled is None else path.write_bytes(spoiled)
            barrier(world)
            rest = run_of(folder, save_strategy="no", **changed)
            with heard("bigtrain") as said:
                rest.train(resume_from_checkpoint=True)
            assert not world.is_main or f"{newest} is passed over" in said.getvalue(), path
            name = path.relative_to(newest).as_posix()
            found.append((name, damage, resumed_from(rest), losses(rest)))
        barrier(world)
        if world.is_main:
            path.write_bytes(content)
    barrier(world)
    rest = run_of(folder, save_strategy="no", **changed)
    rest.train(resume_from_checkpoint=True)
    return [*found, ("", "none", resumed_from(rest), losses(rest))]


@contextmanager
def heard(name: str) -> Iterator[io.StringIO]:
    """What is logged meanwhile."""
    said = io.StringIO()
    handler = logging.StreamHandler(said)
    logging.getLogger(name).addHandler(handler)
    yield said
    logging.getLogger(name).removeHandler(handler)


def barrier(world: RankInfo) -> None:
    if world.world_size > 1:
        dist.barrier()


LAYOUTS = {"single": (1, {}), "ddp": (2, {}), "fsdp": (2, {"fsdp": "full_shard"})}


@pytest.mark.parametrize(
    ("layout", "damages"),
    [
        ("single", ["flipped", "a digit flipped"]),
        *(pytest.param(name, list(DAMAGES), marks=pytest.mark.slow) for name in LAYOUTS),
    ],
    ids=["quick", *LAYOUTS],
)
def test_the_next_older_one_is_gone_on_from_whichever_file_is_damaged(
    tmp_path: Path, layout: str, damages: list[str]
) -> None:
    ranks, changed = LAYOUTS[layout]
    _, whole = harness.run_ranks(ranks, train_some, tmp_path, changed)[0]
    shutil.rmtree(tmp_path / f"checkpoint-{STEPS}")
    arguments = (tmp_path, changed, damages)
    for found in harness.run_ranks(ranks, damaged_one_after_another, *arguments):
        *resumes, undamaged = found
        assert len({name for name, *_ in resumes}) >= 10
        for name, damage, step, again in resumes:
            assert (step, again) == (EVERY, whole), (name, damage)
        assert undamaged[2:] == (STEPS - EVERY, whole)


def test_the_manifest_of_another_step_makes_no_step_of_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = run_of(tmp_path)
    whole.train()
    older, newest = (tmp_path / f"checkpoint-{step}" for step in (STEPS - EVERY, STEPS))
    shutil.copy(older / "manifest.json", newest / "manifest.json")
    rest = run_of(tmp_path, save_strategy="no")
    rest.train(resume_from_checkpoint=True)
    assert resumed_from(rest) == STEPS - EVERY
    assert losses(rest) == losses(whole)
    assert f"{newest} is passed over" in caplog.text


def test_what_has_lost_its_manifest_is_not_taken_for_another_tools(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run_of(tmp_path, max_steps=EVERY).train()
    (tmp_path / f"checkpoint-{EVERY}" / "manifest.json").unlink()
    with pytest.raises(ValueError, match="No valid checkpoint found"):
        run_of(tmp_path).train(resume_from_checkpoint=True)
    assert f"checkpoint-{EVERY} is passed over" in caplog.text


def spoil_a_large_file(checkpoint: Path) -> Path:
    """In a block after the first, which nobody reads before it is loaded."""
    path = max(checkpoint.rglob("*"), key=lambda path: path.stat().st_size)
    assert path.stat().st_size > 5 << 20
    with path.open("r+b") as file:
        file.seek(path.stat().st_size - (1 << 20))
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))
    return path


def train_large(
    world: RankInfo, folder: Path, resume: bool | str, changed: dict[str, Any]
) -> tuple[int, list[Any]]:
    run = run_of(folder, model=tiny_llama(vocab_size=50_000), **changed)
    run.train(resume_from_checkpoint=resume)
    return resumed_from(run), losses(run)


@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_damage_that_only_loading_finds_falls_back_on_all_ranks_together(
    tmp_path: Path, engine: str
) -> None:
    changed: dict[str, Any] = {"fsdp": "full_shard"} if engine == "fsdp" else {}
    changed |= {"per_device_train_batch_size": 2}
    _, whole = harness.run_ranks(2, train_large, tmp_path, False, changed)[0]
    shutil.rmtree(tmp_path / f"checkpoint-{STEPS}")
    spoil_a_large_file(tmp_path / f"checkpoint-{STEPS - EVERY}")
    changed |= {"save_strategy": "no"}
    for step, found in harness.run_ranks(2, train_large, tmp_path, True, changed):
        assert step == EVERY
        assert found == whole
    named = str(tmp_path / f"checkpoint-{STEPS - EVERY}")
    with pytest.raises(AssertionError, match="are not those that were written"):
        harness.run_ranks(2, train_large, tmp_path, named, changed)


class OnSave(TrainerCallback):
    """Notes what there was when a save was told."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, bool]] = []

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        path = Path(args.output_dir) / f"checkpoint-{state.global_step}" / "manifest.json"
        self.seen.append((state.global_step, path.is_file()))


def told(world: RankInfo, folder: Path, changed: dict[str, Any]) -> list[tuple[int, bool]]:
    callback = OnSave()
    run_of(folder, callbacks=[callback], **changed).train()
    return callback.seen


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("later", [True, False], ids=["background", "at once"])
def test_callbacks_are_told_of_every_save_once_it_is_committed(
    tmp_path: Path, world_size: int, later: bool
) -> None:
    changed = {"async_save": later} | ({"fsdp": "full_shard"} if world_size > 1 else {})
    for seen in harness.run_ranks(world_size, told, tmp_path, changed):
        assert seen == [(3, True), (6, True), (9, True)]


def test_an_override_finds_the_files_at_once(tmp_path: Path) -> None:
    found: list[bool] = []

    class Overriding(Trainer):
        def _save_checkpoint(self, model: Any, trial: Any) -> None:
            super()._save_checkpoint(model, trial)
            path = tmp_path / f"checkpoint-{self.state.global_step}"
            found.append((path / "manifest.json").is_file())

    base = run_of(tmp_path)
    run = Overriding(model=tiny_llama(), args=base.args, train_dataset=Sentences(60))
    run.train()
    assert found == [True, True, True]


@pytest.mark.parametrize("policy", ["stop", "continue"])
def test_a_save_that_fails_in_the_background_stops_or_is_said(
    tmp_path: Path, policy: str, caplog: pytest.LogCaptureFixture
) -> None:
    class TakeAway(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == EVERY:
                run._saver._writer._process.send_signal(signal.SIGSTOP)  # type: ignore[union-attr]

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == EVERY:
                run._saver._writer._process.kill()  # type: ignore[union-attr]
                run._saver._writer._process.wait()  # type: ignore[union-attr]

    run = run_of(tmp_path, callbacks=[TakeAway()], on_save_failure=policy, async_save=True)
    message = "the process that writes checkpoints was killed by SIGKILL"
    if policy == "stop":
        with pytest.raises(CheckpointError, match=message):
            run.train()
        assert run.state.global_step < 2 * EVERY
        return
    run.train()
    assert message in caplog.text
    assert sorted(p.name for p in tmp_path.glob("checkpoint-*")) == ["checkpoint-6", "checkpoint-9"]


class FillsTheDisk(TrainerCallback):
    """Leaves so many bytes free once the first checkpoint is there, until a step is done."""

    def __init__(self, disk: Path, *, left: int, until: int = -1) -> None:
        self.ballast, self.left, self.until = disk / "ballast", left, until

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == EVERY:
            free = os.statvfs(self.ballast.parent)
            self.ballast.write_bytes(bytes(max(0, free.f_bavail * free.f_frsize - self.left)))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.until:
            self.ballast.unlink()


@pytest.mark.parametrize("later", [True, False], ids=["background", "at once"])
def test_a_full_disk_is_gone_on_through_when_asked(
    tmp_path: Path, small_disk: Path, later: bool, caplog: pytest.LogCaptureFixture
) -> None:
    whole = run_of(tmp_path)
    whole.train()
    fills = FillsTheDisk(small_disk, left=50 << 10, until=2 * EVERY + 2)
    changed = {"on_save_failure": "continue", "async_save": later}
    run = run_of(small_disk, callbacks=[fills], **changed)
    run.train()
    assert losses(run) == losses(whole)
    assert f"going on without it: no space for the checkpoint in {small_disk}" in caplog.text
    assert {p.name for p in small_disk.iterdir()} == {"checkpoint-3", "checkpoint-9"}


def train_on_a_filling_disk(
    world: RankInfo, disk: Path, left: int, changed: dict[str, Any]
) -> str | None:
    callbacks = [FillsTheDisk(disk, left=left)] if world.is_main else []
    try:
        run_of(disk, callbacks=callbacks, **changed).train()
    except CheckpointError as fault:
        return str(fault)
    return None


@pytest.mark.parametrize("sizes", [3, pytest.param(20, marks=pytest.mark.slow)])
@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_whatever_space_is_left_the_newest_good_step_is_gone_on_from(
    tmp_path: Path, small_disk: Path, engine: str, sizes: int
) -> None:
    changed: dict[str, Any] = {"fsdp": "full_shard"} if engine == "fsdp" else {}
    _, whole = harness.run_ranks(2, train_some, tmp_path, changed)[0]
    resumed = set()
    most = 2000 << 10
    for number in range(sizes):
        left = most * number // (sizes - 1)
        faults = harness.run_ranks(2, train_on_a_filling_disk, small_disk, left, changed)
        assert len(set(faults)) == 1
        assert faults[0] is None or "no space for the checkpoint" in faults[0]
        (small_disk / "ballast").unlink()
        newest = max(int(path.name.removeprefix("checkpoint-")) for path in small_disk.iterdir())
        assert (newest == STEPS) == (faults[0] is None)
        rest = changed | {"save_strategy": "no"}
        for step, found in harness.run_ranks(2, train_some, small_disk, rest):
            assert (step, found) == (newest, whole)
        resumed.add(newest)
        for path in small_disk.iterdir():
            shutil.rmtree(path)
    assert {EVERY, STEPS} <= resumed


def test_a_new_optimizer_is_begun_when_asked(tmp_path: Path) -> None:
    run_of(tmp_path, max_steps=EVERY).train()
    rest = run_of(tmp_path, reset_optimizer=True, save_strategy="no")
    rest.train(resume_from_checkpoint=True)
    assert resumed_from(rest) == EVERY
    steps = {float(state["step"]) for state in rest.optimizer.state.values()}  # type: ignore[union-attr]
    assert steps == {float(STEPS - EVERY)}


def global_order(world: RankInfo, folder: Path, changed: dict[str, Any]) -> list[int]:
    data = Sentences(60)
    run = trainer(
        folder,
        data=data,
        save_strategy="steps",
        save_steps=2,
        gradient_accumulation_steps=1,
        **changed,
    )
    run.train(resume_from_checkpoint=changed.get("resume_from_checkpoint"))
    return data.loaded


def test_another_number_of_ranks_neither_repeats_nor_skips_a_sample(tmp_path: Path) -> None:
    changed: dict[str, Any] = {"num_train_epochs": 1, "max_steps": 2}
    first = harness.run_ranks(
        2, global_order, tmp_path, changed | {"per_device_train_batch_size": 6}
    )
    changed = {"num_train_epochs": 1, "resume_from_checkpoint": str(tmp_path / "checkpoint-2")}
    for world_size in (1, 3):
        size = 12 // world_size
        rest = harness.run_ranks(
            world_size,
            global_order,
            tmp_path / "rest",
            changed | {"per_device_train_batch_size": size},
        )
        # DataLoaders fetch one batch ahead of the step that stops.
        seen = [index for loaded in first for index in loaded[: 2 * 6]]
        seen += [index for loaded in rest for index in loaded]
        assert sorted(seen) == list(range(60)), world_size


def test_another_batch_size_goes_on_at_the_same_sample(tmp_path: Path) -> None:
    first = global_order(RankInfo(), tmp_path, {"max_steps": 4, "per_device_train_batch_size": 6})
    changed = {"num_train_epochs": 1, "resume_from_checkpoint": str(tmp_path / "checkpoint-4")}
    changed |= {"per_device_train_batch_size": 12, "max_steps": 4 + 36 // 12}
    rest = global_order(RankInfo(), tmp_path / "r", changed)
    assert sorted(first[:24] + rest) == list(range(60))


def killed_at(
    world_size: int,
    train: Callable[..., Any],
    arguments: tuple[Any, ...],
    after_s: float,
    victims: int,
) -> None:
    """Ranks that are killed, `victims` of them by us and the others as a launcher would."""
    port = harness._free_port()
    with tempfile.TemporaryDirectory() as folder:
        pids = [
            harness._fork(rank, world_size, port, Path(folder), train, arguments)
            for rank in range(world_size)
        ]
        time.sleep(after_s)
        for pid in random.sample(pids, victims) + pids:
            os.kill(pid, signal.SIGKILL)
        for pid in pids:
            os.waitpid(pid, 0)


def committed(folder: Path) -> list[int]:
    """Steps; a staging's name is longer."""
    names = [path.parent.name for path in folder.glob("checkpoint-*/manifest.json")]
    return [int(name.removeprefix("checkpoint-")) for name in names if "." not in name]


def train_some(
    world: RankInfo, folder: Path, changed: dict[str, Any], resume: bool | None = None
) -> tuple[int, list[Any]]:
    run = run_of(folder, **changed)
    run.train(resume_from_checkpoint=bool(committed(folder)) if resume is None else resume)
    return resumed_from(run), losses(run)


class KilledWhileSaving(Trainer):
    """Dies when the staging is there and nothing is committed."""

    def _write_checkpoint_files(self, directory: Path) -> None:
        super()._write_checkpoint_files(directory)
        os.kill(os.getpid(), signal.SIGKILL)


def leftovers(folder: Path) -> list[str]:
    return [path.name for path in folder.glob("checkpoint-*.*-*")]


def test_what_a_first_save_left_is_cleared_by_the_next_attempt_of_its_run_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(PLAN_VARIABLE, str(make_plan(tmp_path, run_id="this run's")))
    if (pid := os.fork()) == 0:
        base = run_of(tmp_path)
        KilledWhileSaving(model=base.model, args=base.args, train_dataset=Sentences(60)).train()
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == signal.SIGKILL
    assert len(leftovers(tmp_path)) == 1
    shutil.rmtree(tmp_path / "plans")
    monkeypatch.setenv(PLAN_VARIABLE, str(make_plan(tmp_path, run_id="another's")))
    run_of(tmp_path, save_steps=STEPS).train(resume_from_checkpoint=False)
    assert len(leftovers(tmp_path)) == 1
    shutil.rmtree(tmp_path / "plans")
    shutil.rmtree(tmp_path / f"checkpoint-{STEPS}")
    monkeypatch.setenv(PLAN_VARIABLE, str(make_plan(tmp_path, run_id="this run's")))
    run_of(tmp_path, save_steps=STEPS).train()
    assert leftovers(tmp_path) == []


def test_a_run_that_began_anew_goes_on_from_its_own_checkpoints_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run_of(tmp_path, max_steps=STEPS).train()
    anew = time_of_commit(tmp_path)
    path = make_plan(tmp_path, begun_anew=anew)
    monkeypatch.setenv(PLAN_VARIABLE, str(path))
    said = "the same command goes on from"
    assert how_to_go_on(read_plan(path), saved=None) == "no checkpoint was saved"
    run = run_of(tmp_path, max_steps=EVERY)
    run.train()
    assert resumed_from(run) == 0
    assert "was begun anew with --resume never" in caplog.text
    again = run_of(tmp_path, max_steps=EVERY + 1)
    again.train()
    assert resumed_from(again) == EVERY
    newest = tmp_path / f"checkpoint-{EVERY + 1}"
    assert how_to_go_on(read_plan(path), saved=None) == f"{said} {newest}"


KILLS = 102
"""In all, over three engines; each engine's in groups that a test's patience suffices for."""
GROUPS = 4


@pytest.mark.slow
@pytest.mark.parametrize("group", range(GROUPS))
@pytest.mark.parametrize("engine", ["ddp", "fsdp", "zero2"])
def test_killed_at_any_time_a_run_goes_on_with_its_exact_losses(
    tmp_path: Path, engine: str, group: int
) -> None:
    changed: dict[str, Any] = {
        "ddp": {},
        "fsdp": {"fsdp": "full_shard"},
        "zero2": {"deepspeed": {"zero_optimization": {"stage": 2}}},
    }[engine] | {"save_steps": 1, "save_total_limit": 3, "max_steps": 12, "async_save": True}
    started = time.monotonic()
    _, whole = harness.run_ranks(2, train_some, tmp_path / "whole", changed)[0]
    took = time.monotonic() - started
    for attempt in range(group, KILLS // 3, GROUPS):
        folder = tmp_path / str(attempt)
        folder.mkdir()
        after_s = random.uniform(0.1, 1.1) * took
        killed_at(2, train_some, (folder, changed), after_s, attempt // GROUPS % 2 + 1)
        newest = max(committed(folder), default=0)
        for step, found in harness.run_ranks(2, train_some, folder, changed, newest > 0):
            # A writer may have committed another one meanwhile.
            assert step >= newest
            assert found == whole, (attempt, step)
        shutil.rmtree(folder)
