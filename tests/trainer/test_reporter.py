"""Under the launcher: metrics as JSON lines, and events for the console."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerState

from bigtrain.cluster.events import EVENT_VARIABLE, describe_pipe
from bigtrain.trainer.reporter import peak_flops_of
from tests.trainer.samples import Sentences, trainer


@pytest.fixture
def under_a_launcher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The log directory, and a function that reads the events sent so far."""
    reader, writer = os.pipe()
    os.set_blocking(reader, False)
    monkeypatch.setenv(EVENT_VARIABLE, describe_pipe(writer))
    monkeypatch.setenv("BIGTRAIN_LOG_DIR", str(tmp_path / "logs"))
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    (tmp_path / "logs").mkdir()

    def events() -> list[dict[str, Any]]:
        return [json.loads(line) for line in os.read(reader, 1 << 16).decode().splitlines()]

    yield tmp_path / "logs", events
    os.close(reader)
    os.close(writer)


def test_metrics_are_written_at_logging_steps(tmp_path: Path, under_a_launcher: Any) -> None:
    logs, _ = under_a_launcher
    trainer(tmp_path, max_steps=6, logging_steps=3).train()
    lines = [json.loads(line) for line in (logs / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [3, 6]
    for line in lines:
        assert {"loss", "grad_norm", "learning_rate", "epoch", "time"} <= line.keys()
        assert line["step_time_s"] > 0 and line["tokens_per_s"] > 0
        assert line["memory_rss_bytes"] > 1 << 20
        assert "mfu" not in line  # a CPU's peak is not known


def test_the_console_gets_progress_saves_and_evaluations(
    tmp_path: Path, under_a_launcher: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    _, events = under_a_launcher
    trainer(
        tmp_path,
        max_steps=4,
        logging_steps=2,
        save_strategy="steps",
        save_steps=4,
        eval_strategy="steps",
        eval_steps=4,
        eval_dataset=Sentences(4),
    ).train()
    seen = events()
    progress = [event for event in seen if event["kind"] == "progress"]
    assert [(event["step"], event["total"]) for event in progress] == [(2, 4), (4, 4)]
    assert progress[0]["eta_s"] > 0 and progress[0]["loss"] > 0
    assert [event["step"] for event in seen if event["kind"] == "saved"] == [4]
    (evaluated,) = [event for event in seen if event["kind"] == "evaluated"]
    assert evaluated["step"] == 4 and evaluated["eval_loss"] > 0
    assert capsys.readouterr().out == ""


def test_the_history_has_transformers_keys_only(tmp_path: Path, under_a_launcher: Any) -> None:
    run = trainer(tmp_path, max_steps=1)
    run.train()
    assert set(run.state.log_history[0]) == {
        "loss",
        "grad_norm",
        "learning_rate",
        "epoch",
        "step",
    }


def test_pauses_are_no_part_of_a_steps_time(tmp_path: Path, under_a_launcher: Any) -> None:
    logs, _ = under_a_launcher
    reporter = trainer(tmp_path)._reporter
    reporter.start(step=0)
    reporter.count(tokens=1000, flos=0.0)
    time.sleep(0.1)
    with reporter.pausing():
        time.sleep(0.5)
    reporter.report({}, TrainerState(global_step=1))
    (line,) = (json.loads(text) for text in (logs / "metrics.jsonl").read_text().splitlines())
    assert 0.1 <= line["step_time_s"] < 0.4
    assert line["tokens_per_s"] == pytest.approx(1000 / line["step_time_s"])


def test_figures_are_json_and_a_full_disk_ends_no_training(
    tmp_path: Path, under_a_launcher: Any, caplog: pytest.LogCaptureFixture
) -> None:
    logs, _ = under_a_launcher
    run = trainer(tmp_path, max_steps=2, logging_steps=1)
    run._reporter.report({"loss": float("nan")}, TrainerState(global_step=1))
    line = (logs / "metrics.jsonl").read_text()
    assert json.loads(line, parse_constant=lambda name: 1 / 0)["loss"] is None
    (logs / "metrics.jsonl").unlink()
    (logs / "metrics.jsonl").symlink_to("/dev/full")
    run.train()
    assert run.state.global_step == 2
    assert caplog.text.count("No space left on device; no more figures are written") == 1


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 9.89e14),
        ("NVIDIA H100 NVL", 8.35e14),
        ("NVIDIA L40", 1.81e14),
        ("NVIDIA L4", 1.21e14),
        ("Quadro T400", None),
    ],
)
def test_a_devices_peak_is_its_own(name: str, peak: float | None) -> None:
    assert peak_flops_of(name) == peak
