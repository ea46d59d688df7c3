"""Checkpoints become models while training goes on."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from bigtrain.checkpoint.verify import verify_checkpoint
from bigtrain.topology import RankInfo
from bigtrain.trainer import exporting
from bigtrain.trainer.exporting import Exports
from tests.engine import harness
from tests.trainer.samples import Sentences, trainer


def train(world: RankInfo, folder: Path, changed: dict[str, Any]) -> dict[str, torch.Tensor]:
    run = trainer(
        folder,
        data=Sentences(60),
        gradient_accumulation_steps=1,
        max_steps=4,
        save_strategy="steps",
        save_steps=1,
        fsdp="full_shard",
        **changed,
    )
    run.train()
    weights = {name: t for name, t in run.engine.full_weights() if t is not None}
    return {name: tensor.clone() for name, tensor in weights.items()}


def test_every_second_checkpoint_has_its_model_and_is_still_what_was_committed(
    tmp_path: Path,
) -> None:
    changed = {"export": "every", "export_interval": 2, "save_total_limit": 3}
    weights, _ = harness.run_ranks(2, train, tmp_path, changed)

    exported = sorted(path.parent.name for path in tmp_path.glob("checkpoint-*/model"))
    assert exported == ["checkpoint-2", "checkpoint-4"]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-4" / "model")
    ours = load_file(tmp_path / "checkpoint-4" / "model" / "model.safetensors")
    assert ours.keys() == weights.keys() == model.state_dict().keys()
    assert all(torch.equal(ours[name], value) for name, value in weights.items())
    verify_checkpoint(tmp_path / "checkpoint-4", deep=True)
    assert not list(tmp_path.rglob("*.partial"))


def test_a_checkpoint_that_can_not_be_exported_is_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    exports = Exports(interval=1)
    exports.add(tmp_path / "checkpoint-3")
    exports.close(wait=True)
    assert f"{tmp_path / 'checkpoint-3'} was not exported: " in caplog.text
    assert "does not exist" in caplog.text


def test_checkpoints_in_use_stay_and_a_rank_that_has_to_go_does_not_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    sleep = (sys.executable, "-c", "import time; time.sleep(60)")
    monkeypatch.setattr(exporting, "_COMMAND", sleep)
    exports = Exports(interval=1)
    for step in (1, 2, 3):
        exports.add(tmp_path / str(step))
    assert exports.in_use == {tmp_path / "1", tmp_path / "3"}
    assert f"{tmp_path / '2'} was not exported: the disk is too slow" in caplog.text
    with caplog.at_level(logging.WARNING):
        exports.close(wait=False)
    assert f"{tmp_path / '1'} was not exported: training stopped" in caplog.text
    assert exports.in_use == set()


def test_the_exporting_process_says_what_is_wrong_and_runs_no_torch(tmp_path: Path) -> None:
    done = subprocess.run(
        [*exporting._COMMAND, str(tmp_path / "none"), str(tmp_path / "out")],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 4
    assert done.stderr.strip() == f"{tmp_path / 'none'} does not exist"


def test_what_a_killed_export_left_is_cleared_by_the_next(tmp_path: Path) -> None:
    for step, mine in ((1, "journal"), (2, "own")):
        partial = tmp_path / f"checkpoint-{step}" / "model.partial"
        partial.mkdir(parents=True)
        (partial / "model.safetensors").write_bytes(bytes(99))
        if mine == "journal":
            (partial / "journal.jsonl").write_text('{"fingerprint": "x"}\n')
    source = tmp_path / "checkpoint-3"
    source.mkdir()
    save_file({"w": torch.arange(3)}, source / "model.safetensors")

    subprocess.run([*exporting._COMMAND, str(source), str(source / "model")], check=True)

    assert load_file(source / "model" / "model.safetensors")["w"].tolist() == [0, 1, 2]
    left = [path.parent.name for path in tmp_path.glob("*/model.partial")]
    assert left == ["checkpoint-2"]  # nothing says that it was ours


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"export": "always"}, "export is 'always'; use last, every or never"),
        ({"export_interval": 0}, "export_interval is 0; it must be at least 1"),
    ],
)
def test_wrong_arguments_are_refused(tmp_path: Path, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, **fields)
