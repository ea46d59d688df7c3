"""A signal ends a run under the launcher with a checkpoint, everywhere at once."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerCallback

from bigtrain.checkpoint.verify import verify_checkpoint
from bigtrain.plan import PLAN_VARIABLE, RunPlan, write_plan
from bigtrain.topology import RankInfo, Topology
from bigtrain.translate.config import DdpSettings, EngineConfig, EngineSettings, SingleSettings
from tests.engine.harness import run_ranks
from tests.trainer.samples import Sentences, losses, trainer


def make_plan(folder: Path, *, ranks: int = 1, **fields: Any) -> Path:
    settings: EngineSettings = SingleSettings() if ranks == 1 else DdpSettings()
    plan = RunPlan(
        name="run",
        source=str(folder / "run.yaml"),
        working_dir=str(folder),
        topology=Topology(procs_per_node=ranks),
        device="cpu",
        engine=EngineConfig(name="single" if ranks == 1 else "ddp", settings=settings),
        output_dir=str(folder),
        **{"kind": "run_file", **fields},
    )
    path = folder / "plans" / "attempt-01.json"
    write_plan(plan, path)
    return path


class SignalsAt(TrainerCallback):
    """Sends itself a signal at one step, or at the first batch of an evaluation."""

    def __init__(self, number: int, *, step: int | None = None) -> None:
        self.number, self.step = number, step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            os.kill(os.getpid(), self.number)

    def on_prediction_step(self, *args: Any, **kwargs: Any) -> None:
        if self.step is None:
            self.step = -1
            os.kill(os.getpid(), self.number)


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGTERM, 143), (signal.SIGUSR1, 85), (signal.SIGUSR2, 85)],
)
def test_a_signal_saves_and_leaves_with_its_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, code: int
) -> None:
    whole = trainer(tmp_path / "whole")
    whole.train()
    monkeypatch.setenv(PLAN_VARIABLE, str(make_plan(tmp_path)))
    run = trainer(tmp_path / "run", callbacks=[SignalsAt(number, step=4)])
    with pytest.raises(SystemExit) as left:
        run.train()
    assert left.value.code == code
    rest = trainer(tmp_path / "run")
    rest.train(resume_from_checkpoint=True)
    assert rest._initial_global_step == 4
    assert losses(rest) == losses(whole)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_an_evaluation_is_left_in_its_middle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(PLAN_VARIABLE, str(make_plan(tmp_path)))
    run = trainer(
        tmp_path,
        callbacks=[SignalsAt(signal.SIGTERM)],
        eval_strategy="steps",
        eval_steps=3,
        eval_dataset=Sentences(40),
        per_device_eval_batch_size=2,
    )
    with pytest.raises(SystemExit):
        run.train()
    assert (tmp_path / "checkpoint-3" / "manifest.json").is_file()
    assert not any("eval_loss" in entry for entry in run.state.log_history)


def test_without_a_launcher_signals_are_left_alone(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGUSR1)
    run = trainer(tmp_path, max_steps=1)
    with run._stop.listening():
        assert signal.getsignal(signal.SIGUSR1) == before


def _signalled_rank(world: RankInfo, folder: str, plan: str) -> tuple[Any, int]:
    os.environ[PLAN_VARIABLE] = plan
    callbacks = [SignalsAt(signal.SIGUSR1, step=2)] if world.rank == 1 else []
    run = trainer(folder, data=Sentences(64), callbacks=callbacks)
    try:
        run.train()
    except SystemExit as left:
        return left.code, run.state.global_step
    return 0, run.state.global_step


def test_ranks_leave_together_when_one_was_told(tmp_path: Path) -> None:
    plan = make_plan(tmp_path, ranks=2)
    results = run_ranks(2, _signalled_rank, str(tmp_path), str(plan))
    assert results[0] == results[1] == (85, 3)
    manifest = json.loads((tmp_path / "checkpoint-3" / "manifest.json").read_text())
    assert manifest["world_size"] == 2


class SignalsWhileLoading(Sentences):
    """Sends its process a signal when the first row is asked for."""

    def __init__(self, count: int, number: int) -> None:
        super().__init__(count)
        self.number = number

    def __getitem__(self, index: int) -> Any:
        if not self.loaded:
            os.kill(os.getpid(), self.number)
        return super().__getitem__(index)


def _signal_at_every_sync(number: int) -> None:
    """From now on whatever is synced to the disk here, in threads and children too, sends the
    signal to this process once more."""
    pid, fsync = os.getpid(), os.fsync

    def noisy(descriptor: Any) -> None:
        os.kill(pid, number)
        fsync(descriptor)

    os.fsync = noisy  # type: ignore[assignment]


def _signalled_in(world: RankInfo, folder: str, plan: str) -> dict[str, tuple[Any, int]]:
    """Moment → exit code and steps done, of runs in which rank 1 alone gets a signal then."""
    os.environ[PLAN_VARIABLE] = plan
    is_told = world.rank == 1
    loading = SignalsWhileLoading(64, signal.SIGUSR1) if is_told else Sentences(64)
    evaluating = {
        "eval_strategy": "steps",
        "eval_steps": 2,
        "eval_dataset": Sentences(40),
        "per_device_eval_batch_size": 2,
    }
    runs: dict[str, dict[str, Any]] = {
        "evaluation": {"callbacks": [SignalsAt(signal.SIGTERM)] if is_told else [], **evaluating},
        "first batch": {"data": loading},
        "save": {"callbacks": [SignalsAt(signal.SIGTERM, step=2)]},
    }
    found = {}
    for moment, fields in runs.items():
        if moment == "save":
            _signal_at_every_sync(signal.SIGUSR2)
        run = trainer(f"{folder}/{moment}", **{"data": Sentences(64), **fields})
        try:
            run.train()
            found[moment] = (0, run.state.global_step)
        except SystemExit as left:
            found[moment] = (left.code, run.state.global_step)
    return found


def test_a_signal_in_an_evaluation_the_first_batch_or_a_save_leaves_a_whole_checkpoint(
    tmp_path: Path,
) -> None:
    results = run_ranks(2, _signalled_in, str(tmp_path), str(make_plan(tmp_path, ranks=2)))
    assert results[0] == results[1]
    codes = {moment: code for moment, (code, _) in results[0].items()}
    assert codes == {"evaluation": 143, "first batch": 85, "save": 143}
    for moment, (_, step) in results[0].items():
        assert step <= 3, moment
        verify_checkpoint(tmp_path / moment / f"checkpoint-{step}", deep=True)
