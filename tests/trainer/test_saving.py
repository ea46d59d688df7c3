"""Checkpoints and what becomes of them: layout, rotation, the best one, exact continuation."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import LlamaForCausalLM, TrainerCallback

from bigtrain.errors import CheckpointError
from bigtrain.topology import RankInfo
from bigtrain.trainer.trainer import Trainer
from tests.engine.harness import run_ranks
from tests.trainer.samples import (
    Sentences,
    Stream,
    arguments,
    history,
    losses,
    same_weights,
    tiny_llama,
    trainer,
)


def steps_saved(folder: Path) -> list[int]:
    return sorted(int(path.name.split("-")[1]) for path in folder.glob("checkpoint-*"))


def test_a_checkpoint_has_transformers_files_and_a_manifest(
    tmp_path: Path, byte_tokenizer: Any
) -> None:
    trainer(
        tmp_path, max_steps=2, save_strategy="steps", save_steps=2, processing_class=byte_tokenizer
    ).train()
    names = {path.name for path in (tmp_path / "checkpoint-2").iterdir()}
    expected = {
        "config.json",
        "generation_config.json",
        "manifest.json",
        "model.safetensors",
        "optimizer.pt",
        "rng_state.pth",
        "scheduler.pt",
        "tokenizer.json",
        "tokenizer_config.json",
        "trainer_state.json",
        "training_args.bin",
    }
    assert expected <= names
    state = json.loads((tmp_path / "checkpoint-2" / "trainer_state.json").read_text())
    assert (state["global_step"], state["max_steps"]) == (2, 2)


@pytest.mark.parametrize("at", [3, 6, 8], ids=["mid-epoch", "at an epoch's end", "second epoch"])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_training_is_the_same_to_the_last_bit(
    tmp_path: Path, at: int, workers: int
) -> None:
    changed = {"gradient_accumulation_steps": 1, "dataloader_num_workers": workers}
    whole = trainer(
        tmp_path / "whole",
        model=tiny_llama(dropout=0.1),
        save_strategy="steps",
        save_steps=at,
        **changed,
    )
    whole.train()
    rest = trainer(tmp_path / "rest", model=tiny_llama(seed=9, dropout=0.1), **changed)
    rest.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{at}"))
    assert history(rest)[:-1] == history(whole)[:-1]
    assert same_weights(rest.model, whole.model)


def test_accumulation_resumes_in_the_middle_of_an_epoch(tmp_path: Path) -> None:
    changed = {"gradient_accumulation_steps": 2, "num_train_epochs": 3}
    whole = trainer(tmp_path, save_strategy="steps", save_steps=5, **changed)
    whole.train()
    rest = trainer(tmp_path / "rest", **changed)
    rest.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    assert losses(rest) == losses(whole)


def test_a_stream_resumes_where_it_was(tmp_path: Path) -> None:
    changed = {"max_steps": 8}
    whole = trainer(tmp_path, data=Stream(22), save_strategy="steps", save_steps=3, **changed)
    whole.train()
    rest = trainer(tmp_path / "rest", data=Stream(22), **changed)
    rest.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert losses(rest) == losses(whole)


def test_seeking_loads_no_skipped_sample(tmp_path: Path) -> None:
    trainer(tmp_path, save_strategy="steps", save_steps=4, max_steps=4).train()
    data = Sentences(22)
    run = trainer(tmp_path / "rest", data=data, num_train_epochs=1)
    run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert len(data.loaded) == 22 - 4 * 4


def test_ignore_data_skip_starts_the_data_anew(tmp_path: Path) -> None:
    trainer(tmp_path, save_strategy="steps", save_steps=4, max_steps=4).train()
    data = Sentences(22)
    run = trainer(tmp_path / "rest", data=data, num_train_epochs=1, ignore_data_skip=True)
    run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert len(data.loaded) > 22 - 4 * 4


def test_transformers_resumes_from_ours_and_we_from_theirs(tmp_path: Path) -> None:
    whole = trainer(tmp_path / "ours", save_strategy="steps", save_steps=5)
    whole.train()
    args = arguments(
        tmp_path / "theirs",
        kind=transformers.TrainingArguments,
        save_strategy="steps",
        save_steps=5,
    )
    theirs = transformers.Trainer(model=tiny_llama(), args=args, train_dataset=Sentences(22))
    theirs.train(resume_from_checkpoint=str(tmp_path / "ours" / "checkpoint-5"))
    assert losses(theirs) == losses(whole)
    shutil.rmtree(tmp_path / "theirs")
    theirs = transformers.Trainer(model=tiny_llama(), args=args, train_dataset=Sentences(22))
    theirs.train()
    ours = trainer(tmp_path / "again")
    ours.train(resume_from_checkpoint=str(tmp_path / "theirs" / "checkpoint-5"))
    assert losses(ours) == losses(whole)


def test_true_resumes_from_the_newest_that_holds(tmp_path: Path) -> None:
    whole = trainer(tmp_path, save_strategy="steps", save_steps=4)
    whole.train()
    assert steps_saved(tmp_path) == [4, 8, 12]
    (tmp_path / "checkpoint-12" / "manifest.json").write_text("{")
    (tmp_path / "checkpoint-8" / "manifest.json").unlink()
    (tmp_path / "checkpoint-8" / "model.safetensors").unlink()
    rest = trainer(tmp_path)
    rest.train(resume_from_checkpoint=True)
    assert losses(rest) == losses(whole)
    assert rest._initial_global_step == 4


def test_nothing_to_resume_from_is_said(tmp_path: Path) -> None:
    run = trainer(tmp_path)
    with pytest.raises(ValueError, match="No valid checkpoint found in output directory"):
        run.train(resume_from_checkpoint=True)
    with pytest.raises(CheckpointError, match="Can't find a valid checkpoint at .*nowhere"):
        run.train(resume_from_checkpoint=str(tmp_path / "nowhere"))


@pytest.mark.parametrize("asked", [None, False])
def test_overwriting_continues_unless_it_is_told_not_to(tmp_path: Path, asked: bool | None) -> None:
    trainer(tmp_path, save_strategy="steps", save_steps=3, max_steps=3).train()
    run = trainer(tmp_path, overwrite_output_dir=True, max_steps=5)
    run.train(resume_from_checkpoint=asked)
    assert run._initial_global_step == (0 if asked is False else 3)


def test_old_checkpoints_go_but_never_the_best_or_anothers(tmp_path: Path) -> None:
    trainer(tmp_path, save_strategy="steps", save_steps=1, max_steps=1).train()
    run = trainer(
        tmp_path,
        save_strategy="steps",
        save_steps=2,
        eval_strategy="steps",
        eval_steps=2,
        eval_dataset=Sentences(4),
        save_total_limit=2,
        load_best_model_at_end=True,
        metric_for_best_model="loss",
        learning_rate=0.1,
        num_train_epochs=3,
    )
    run.train()
    evaluated = {e["step"]: e["eval_loss"] for e in run.state.log_history if "eval_loss" in e}
    best = min(evaluated, key=evaluated.__getitem__)
    assert run.state.best_model_checkpoint == str(tmp_path / f"checkpoint-{best}")
    assert steps_saved(tmp_path) == sorted({1, best, 18} | ({16} if best == 18 else set()))
    assert run.evaluate()["eval_loss"] == pytest.approx(evaluated[best])


def test_best_saves_only_what_is_the_best_so_far(tmp_path: Path) -> None:
    run = trainer(
        tmp_path,
        save_strategy="best",
        metric_for_best_model="loss",
        eval_strategy="steps",
        eval_steps=2,
        eval_dataset=Sentences(4),
        learning_rate=0.1,
    )
    run.train()
    best, so_far = [], float("inf")
    for entry in run.state.log_history:
        if entry.get("eval_loss", so_far) < so_far:
            so_far = entry["eval_loss"]
            best.append(entry["step"])
    assert steps_saved(tmp_path) == best


def test_a_model_alone_can_not_be_resumed_from(tmp_path: Path) -> None:
    trainer(
        tmp_path, save_strategy="steps", save_steps=2, max_steps=2, save_only_model=True
    ).train()
    assert not (tmp_path / "checkpoint-2" / "optimizer.pt").exists()
    with pytest.raises(CheckpointError, match="save_only_model"):
        trainer(tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_save_model_keeps_the_precision_that_the_model_came_with(tmp_path: Path) -> None:
    run = trainer(tmp_path, model=tiny_llama().to(torch.bfloat16), bf16=True, max_steps=2)
    run.train()
    assert next(run.model.parameters()).dtype == torch.float32  # the master
    run.save_model(str(tmp_path / "final"))
    loaded = LlamaForCausalLM.from_pretrained(tmp_path / "final")
    assert loaded.dtype == torch.bfloat16
    for one, other in zip(loaded.parameters(), run.model.parameters(), strict=True):
        assert torch.equal(one, other.to(torch.bfloat16))


def test_a_checkpoint_keeps_the_masters(tmp_path: Path) -> None:
    def run(folder: str, **changed: Any) -> Trainer:
        model = tiny_llama().to(torch.bfloat16)
        return trainer(tmp_path / folder, model=model, bf16=True, **changed)

    whole = run("whole", save_strategy="steps", save_steps=3)
    whole.train()
    rest = run("rest")
    rest.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert losses(rest) == losses(whole)


def test_weights_in_torchs_format_load_and_resume(tmp_path: Path) -> None:
    changed = {"save_safetensors": False}
    whole = trainer(tmp_path, save_strategy="steps", save_steps=5, **changed)
    whole.train()
    assert (tmp_path / "checkpoint-5" / "pytorch_model.bin").is_file()
    rest = trainer(tmp_path / "rest", **changed)
    rest.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    assert losses(rest) == losses(whole)


def test_tied_weights_resume(tmp_path: Path) -> None:
    def model() -> LlamaForCausalLM:
        return tiny_llama(tie_word_embeddings=True)

    whole = trainer(tmp_path, model=model(), save_strategy="steps", save_steps=5)
    whole.train()
    rest = trainer(tmp_path / "rest", model=model())
    rest.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    assert losses(rest) == losses(whole)


class Counting(TrainerCallback, transformers.trainer_callback.ExportableState):
    def __init__(self, start: int = 0) -> None:
        self.start = start
        self.count = 0

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.count += 1

    def state(self) -> dict[str, Any]:
        return {"args": {"start": self.start}, "attributes": {"count": self.count}}


@pytest.mark.parametrize("restores", [True, False])
def test_callbacks_states_come_back_when_asked_for(tmp_path: Path, restores: bool) -> None:
    first = Counting(start=7)
    trainer(tmp_path, callbacks=[first], save_strategy="steps", save_steps=3, max_steps=3).train()
    run = trainer(
        tmp_path,
        callbacks=[Counting()],
        max_steps=5,
        restore_callback_states_from_checkpoint=restores,
    )
    run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    counting = run.pop_callback(Counting)
    assert isinstance(counting, Counting)
    assert (counting.start, counting.count) == ((7, 5) if restores else (0, 2))


def test_on_save_comes_after_the_commit(tmp_path: Path) -> None:
    class Sees(TrainerCallback):
        seen: bool = False

        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            self.seen = (folder / "manifest.json").is_file()

    sees = Sees()
    trainer(tmp_path, callbacks=[sees], save_strategy="steps", save_steps=2, max_steps=2).train()
    assert sees.seen


def test_a_second_training_of_the_same_trainer_goes_on_with_its_weights(tmp_path: Path) -> None:
    run = trainer(tmp_path, max_steps=3)
    run.train()
    first = losses(run)
    run.train()
    assert losses(run)[0] != first[0] and run.state.global_step == 3


def test_model_init_makes_each_training_a_fresh_one(tmp_path: Path) -> None:
    args = arguments(tmp_path, max_steps=3)
    run = Trainer(model_init=lambda: tiny_llama(), args=args, train_dataset=Sentences(22))
    run.train()
    first = losses(run)
    run.train()
    assert losses(run) == first


def fail_to_export(world: RankInfo, folder: Path, changed: dict[str, Any]) -> str:
    run = trainer(folder, max_steps=1, **changed)
    run.train()
    (folder / "file").touch()
    with pytest.raises(Exception, match="file") as failed:
        run.save_model(str(folder / "file"))
    run.save_model()
    return type(failed.value).__name__


def test_all_ranks_hear_that_a_model_could_not_be_written(tmp_path: Path) -> None:
    found = run_ranks(2, fail_to_export, tmp_path, {"fsdp": "full_shard"})

    assert found == ["CheckpointError", "CheckpointError"]
    assert LlamaForCausalLM.from_pretrained(tmp_path)


def test_the_main_process_alone_may_save_a_model_that_it_has_whole(tmp_path: Path) -> None:
    def save(world: RankInfo) -> None:
        run = trainer(tmp_path, max_steps=1)
        run.train()
        if run.is_world_process_zero():
            run.save_model()

    run_ranks(2, save)
    assert LlamaForCausalLM.from_pretrained(tmp_path)
