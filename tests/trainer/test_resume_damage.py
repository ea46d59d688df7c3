"""What is damaged is noticed before anything is lost over it."""

from __future__ import annotations

import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import TrainerCallback

from bigtrain.checkpoint.blocks import BLOCK_BYTES
from bigtrain.checkpoint.load import open_checkpoint
from bigtrain.errors import CheckpointError
from bigtrain.topology import RankInfo
from tests.checkpoint.test_foreign import flip_in
from tests.engine import harness
from tests.trainer.samples import Sentences, tiny_llama
from tests.trainer.test_survival import EVERY, barrier, resumed_from, run_of

BEST, NEWEST = f"checkpoint-{EVERY}", f"checkpoint-{2 * EVERY}"
SHARDED: dict[str, dict[str, Any]] = {
    "fsdp": {"fsdp": "full_shard"},
    "zero2": {"deepspeed": {"zero_optimization": {"stage": 2}}},
}


class SpoilsTheBest(TrainerCallback):
    """When all is trained and saved: a block that only rank 1 reads."""

    def __init__(self, world: RankInfo) -> None:
        self.world = world

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if "train_runtime" not in logs:
            return
        if self.world.is_main:
            assert Path(state.best_model_checkpoint).name == BEST
            path = Path(state.best_model_checkpoint) / "weights" / "__1_0.distcp"
            assert path.stat().st_size > 5 << 20
            with path.open("r+b") as file:
                file.seek(-(1 << 20), os.SEEK_END)
                byte = file.read(1)
                file.seek(-1, os.SEEK_CUR)
                file.write(bytes([byte[0] ^ 1]))
        barrier(self.world)


def ends_with_a_damaged_best(world: RankInfo, folder: Path, changed: dict[str, Any]) -> str | None:
    run = run_of(
        folder,
        model=tiny_llama(vocab_size=50_000),
        eval_dataset=Sentences(8),
        callbacks=[SpoilsTheBest(world)],
        max_steps=2 * EVERY,
        per_device_train_batch_size=2,
        eval_strategy="steps",
        eval_steps=EVERY,
        load_best_model_at_end=True,
        greater_is_better=True,  # the loss, which falls
        save_total_limit=1,
        **changed,
    )
    try:
        run.train()
    except CheckpointError as fault:
        return str(fault)
    return None


@pytest.mark.parametrize("engine", SHARDED)
def test_a_best_checkpoint_that_one_rank_can_not_read_takes_no_other_away(
    tmp_path: Path, engine: str
) -> None:
    faults = harness.run_ranks(2, ends_with_a_damaged_best, tmp_path, SHARDED[engine])
    for fault in faults:
        assert fault is not None
        assert "are not those that were written" in fault
    assert (tmp_path / NEWEST / "manifest.json").is_file()


def spoil_last(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 64
    path.write_bytes(content)


def test_what_has_lost_its_manifest_is_refused_by_its_path_too(tmp_path: Path) -> None:
    run_of(tmp_path, max_steps=2 * EVERY).train()
    newest = tmp_path / NEWEST
    (newest / "manifest.json").unlink()
    spoil_last(newest / "model.safetensors")
    killed = newest.rename(tmp_path / f"{NEWEST}.tmp-a-b")
    for path in (shutil.copytree(killed, newest), killed):
        with pytest.raises(ValueError, match=r"has no manifest.json: it was never committed") as e:
            run_of(tmp_path).train(resume_from_checkpoint=str(path))
        assert f"give one of {tmp_path / BEST}" in str(e.value)
        with pytest.raises(CheckpointError, match="it was never committed, or has lost it"):
            open_checkpoint(path)
        with pytest.raises(CheckpointError, match="it was never committed, or has lost it"):
            run_of(tmp_path)._load_from_checkpoint(path)


class LogsMuch(TrainerCallback):
    """So that the trainer's state has more than one block."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        state.log_history = [{"step": 0, "said": "x" * 1000}] * 5000


def test_a_long_trainers_state_is_no_less_checked(tmp_path: Path) -> None:
    run_of(tmp_path, max_steps=2 * EVERY, callbacks=[LogsMuch()]).train()
    state = tmp_path / NEWEST / "trainer_state.json"
    written = state.read_bytes()
    assert len(written) > BLOCK_BYTES
    state.write_bytes(written.replace(b'"global_step": 6', b'"global_step": 7'))
    rest = run_of(tmp_path, save_strategy="no", max_steps=2 * EVERY + 1)
    rest.train(resume_from_checkpoint=True)
    assert resumed_from(rest) == EVERY


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"foo": 1}, "foo"),
        ({"global_step": "4"}, r'its global_step is "4"'),
        ({"global_step": -1}, "its global_step is -1"),
        ({"log_history": None}, "its log_history is null"),
        (None, "it has no global_step"),
    ],
)
def test_a_state_that_no_trainer_goes_on_from_is_passed_over(
    tmp_path: Path,
    changed: dict[str, Any] | None,
    why: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    run_of(tmp_path, max_steps=2 * EVERY).train()
    path = tmp_path / NEWEST / "trainer_state.json"
    state = {} if changed is None else json.loads(path.read_text()) | changed
    path.write_text(json.dumps(state))
    rest = run_of(tmp_path, save_strategy="no")
    rest.train(resume_from_checkpoint=True)
    assert resumed_from(rest) == EVERY
    assert f"{tmp_path / NEWEST} is passed over: {path} is no trainer's state" in caplog.text
    with pytest.raises(CheckpointError, match=f"is no trainer's state .*{why}"):
        run_of(tmp_path).train(resume_from_checkpoint=str(tmp_path / NEWEST))


def test_where_no_trainers_state_can_be_gone_on_from_nothing_begins_anew(tmp_path: Path) -> None:
    run_of(tmp_path, max_steps=2 * EVERY).train()
    for path in tmp_path.glob("checkpoint-*/trainer_state.json"):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"of_a_later_version": 1}))
    with pytest.raises(CheckpointError, match="unexpected keyword argument 'of_a_later_version'"):
        run_of(tmp_path).train(resume_from_checkpoint=True)


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_a_flipped_bit_beside_others_adapters_is_refused(tmp_path: Path, name: str) -> None:
    peft = pytest.importorskip("peft")

    def adapted(**changed: Any) -> Any:
        model = peft.get_peft_model(tiny_llama(), peft.LoraConfig(target_modules=["q_proj"]))
        return run_of(tmp_path, model=model, max_steps=2 * EVERY, **changed)

    adapted(save_strategy="steps").train()
    path = tmp_path / BEST
    (path / "manifest.json").unlink()
    shutil.rmtree(path / "manifest")  # as transformers' Trainer writes it
    adapted(save_strategy="no").train(resume_from_checkpoint=str(path))
    flip_in(path / name, "data/0" if name != "scheduler.pt" else "data.pkl")
    with pytest.raises(CheckpointError, match=f"{name}: its record"):
        adapted(save_strategy="no").train(resume_from_checkpoint=str(path))


@pytest.mark.parametrize("is_ours", [True, False], ids=["bigtrain's", "transformers'"])
def test_what_can_not_be_verified_is_said_where_it_once_could(
    tmp_path: Path, is_ours: bool, caplog: pytest.LogCaptureFixture
) -> None:
    run_of(tmp_path, max_steps=EVERY).train()
    path = tmp_path / BEST
    (path / "manifest.json").unlink()
    shutil.rmtree(path / "manifest")
    if not is_ours:
        theirs = transformers.TrainingArguments(output_dir=str(tmp_path), use_cpu=True)
        torch.save(theirs, path / "training_args.bin")
    rest = run_of(tmp_path, save_strategy="no")
    with caplog.at_level(logging.INFO, logger="bigtrain"):
        rest.train(resume_from_checkpoint=True)
    assert resumed_from(rest) == EVERY
    (said,) = [r for r in caplog.records if "has no manifest that describes it" in r.getMessage()]
    assert str(path) in said.getMessage()
    assert said.levelno == (logging.WARNING if is_ours else logging.INFO)
