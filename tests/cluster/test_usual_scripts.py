"""Scripts that go as the usual examples do train, go on, evaluate and save on the planned engine.

tests/scripts/run_clm.py (transformers' Trainer), run_clm_no_trainer.py (accelerate's Accelerator)
and sft.py (TRL) say nothing of engines; two ranks run each.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from bigtrain.data.byte_tokenizer import make_byte_tokenizer
from bigtrain.planning import nvme

_SCRIPTS = Path(__file__).parent.parent / "scripts"
_KINDS = {"fsdp": "DistributedType.FSDP", "zero3": "DistributedType.DEEPSPEED"}
_BLOCK = 32
_ENGINES = ["zero3", pytest.param("fsdp", marks=pytest.mark.slow)]
_OTHER_ENGINE_FIRST = ["fsdp", pytest.param("zero3", marks=pytest.mark.slow)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """With a model, its tokenizer and a text in it."""
    _write_model(tmp_path, hidden_size=32)
    lines = (f"the number {i} is followed by {i + 1}" for i in range(120))
    (tmp_path / "text.txt").write_text("\n".join(lines))
    return tmp_path


def _write_model(folder: Path, *, hidden_size: int) -> None:
    torch.manual_seed(0)
    tokenizer = make_byte_tokenizer()
    config = LlamaConfig(
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=len(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")


def _launch(
    script: str, engine: str, folder: Path, *arguments: str, flags: Sequence[str] = ()
) -> list[dict[str, Any]]:
    """What each of two ranks wrote down. `flags` are bigtrain's own."""
    command = [sys.executable, "-m", "bigtrain", "launch", str(_SCRIPTS / script)]
    command += ["--engine", engine, "--procs-per-node", "2", "--output-dir", "logs", *flags]
    done = subprocess.run(
        [*command, "--", "--output_dir", str(folder / "out"), *arguments],
        capture_output=True,
        text=True,
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(_SCRIPTS.parent.parent)},
        timeout=900,  # DeepSpeed may compile
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return [json.loads((folder / f"out/rank-{rank}.json").read_text()) for rank in range(2)]


def _expect_the_engine(ranks: list[dict[str, Any]], engine: str, folder: Path) -> None:
    """Two ranks that each hold a part of the model; one step more lowers the loss."""
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    whole = sum(parameter.numel() for parameter in model.parameters())
    for seen in ranks:
        assert (seen["world"], seen["kind"]) == (2, _KINDS[engine])
        assert seen["elements"] < 0.75 * whole
        assert seen["losses"] == ranks[0]["losses"]
    assert ranks[0]["losses"]["6"] < ranks[0]["losses"]["1"] - 0.3


def _loss_of_saved(folder: Path, rows: list[list[int]]) -> float:
    """What the model that the script has saved says of `rows`, in one process."""
    model = AutoModelForCausalLM.from_pretrained(folder / "out").eval()
    tokens = torch.tensor(rows)
    with torch.no_grad():
        return float(model(input_ids=tokens, labels=tokens).loss)


def _blocks(text: str, number: int) -> list[list[int]]:
    ids = make_byte_tokenizer()(text)["input_ids"]
    return [ids[i * _BLOCK : (i + 1) * _BLOCK] for i in range(number)]


@pytest.mark.parametrize("engine", _ENGINES)
def test_a_script_like_run_clm_trains_goes_on_evaluates_and_saves(
    engine: str, folder: Path
) -> None:
    said = ["--model_name_or_path", "model", "--train_file", "text.txt"]
    said += ["--validation_file", "text.txt", "--max_eval_samples", "6"]
    # Three for each rank, so that no sample fills up a batch.
    said += ["--per_device_eval_batch_size", "3"]
    said += ["--do_train", "--do_eval", "--max_steps", "6", "--save_steps", "3"]
    said += ["--eval_strategy", "steps", "--eval_steps", "3", "--logging_steps", "1"]
    said += ["--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "2"]
    said += ["--learning_rate", "1e-2", "--warmup_steps", "2", "--report_to", "none"]

    whole = _launch("run_clm.py", engine, folder, *said)

    _expect_the_engine(whole, engine, folder)
    lines = (folder / "text.txt").read_text().replace("\n", "")
    evaluated = whole[0]["evaluated"]
    assert len(evaluated) == 3
    assert evaluated[-1] < evaluated[0]
    assert _loss_of_saved(folder, _blocks(lines, 6)) == pytest.approx(evaluated[-1], rel=1e-4)

    shutil.rmtree(folder / "out/checkpoint-6")
    gone_on = _launch("run_clm.py", engine, folder, *said)

    for step in "456":
        assert gone_on[0]["losses"][step] == pytest.approx(whole[0]["losses"][step], rel=1e-5)
    assert gone_on[0]["evaluated"][-1] == pytest.approx(evaluated[-1], rel=1e-5)
    done = json.loads((folder / "out/train_results.json").read_text())
    assert done["epoch"] == pytest.approx(json.loads(_state(folder))["epoch"])


def _state(folder: Path) -> str:
    return (folder / "out/trainer_state.json").read_text()


@pytest.mark.slow
def test_an_optimizer_on_nvme_trains_as_one_in_memory_and_is_saved(folder: Path) -> None:
    if why := nvme.lacking(os.environ):
        pytest.skip(why)
    _write_model(folder, hidden_size=320)  # DeepSpeed keeps what is less than a MiB in memory
    said = ["--model_name_or_path", "model", "--train_file", "text.txt"]
    said += ["--validation_file", "text.txt", "--do_train", "--max_steps", "3", "--save_steps", "2"]
    said += ["--per_device_train_batch_size", "2", "--logging_steps", "1", "--report_to", "none"]
    disk = folder / "disk"
    disk.mkdir()
    flags = ["--set", "engine.offload_optimizer=nvme", "--set", f"engine.nvme_path={disk}"]

    in_memory = _launch("run_clm.py", "zero3", folder, *said)
    shutil.rmtree(folder / "out")
    on_disk = _launch("run_clm.py", "zero3", folder, *said, flags=flags)

    assert on_disk[0]["losses"] == pytest.approx(in_memory[0]["losses"], rel=1e-6)
    assert list(disk.rglob("rank1/exp_avg_sq-*.swp"))
    assert list(folder.rglob("checkpoint-2/**/offloaded_tensors/rank01/*"))


@pytest.mark.parametrize("engine", _OTHER_ENGINE_FIRST)
def test_a_script_like_run_clm_no_trainer_trains_goes_on_evaluates_and_saves(
    engine: str, folder: Path
) -> None:
    said = ["--model_name_or_path", "model", "--train_file", "text.txt"]

    whole = _launch("run_clm_no_trainer.py", engine, folder, *said)

    _expect_the_engine(whole, engine, folder)
    each = whole[0]["evaluated"]
    assert len(each) == 7, "a sample of the last, shorter batch was counted twice"
    first = _blocks((folder / "text.txt").read_text(), 2)
    assert _loss_of_saved(folder, first) == pytest.approx(each[0], rel=1e-4)

    said += ["--resume_from_checkpoint", "out/step_3"]
    gone_on = _launch("run_clm_no_trainer.py", engine, folder, *said)

    assert sorted(gone_on[0]["losses"]) == ["4", "5", "6"]
    for step in "456":
        assert gone_on[0]["losses"][step] == pytest.approx(whole[0]["losses"][step], rel=1e-5)
    assert gone_on[0]["norms"] == pytest.approx(
        {step: norm for step, norm in whole[0]["norms"].items() if int(step) > 3}, rel=1e-4
    )


@pytest.mark.parametrize("engine", _OTHER_ENGINE_FIRST)
def test_trl_trains_and_saves(engine: str, folder: Path) -> None:
    pytest.importorskip("trl")
    said = ["--max_steps", "6", "--logging_steps", "1", "--report_to", "none"]
    said += ["--per_device_train_batch_size", "2", "--learning_rate", "1e-2", "--bf16", "true"]

    ranks = _launch("sft.py", engine, folder, *said)

    for seen in ranks:
        assert (seen["world"], seen["kind"]) == (2, _KINDS[engine])
    losses = ranks[0]["losses"]
    assert losses["6"] < losses["1"] - 0.3
    assert len(ranks[0]["accuracies"]) == 6
    text = "the number 1 is followed by 2. " * 3
    start = AutoModelForCausalLM.from_pretrained(folder / "model").eval()
    tokens = torch.tensor([make_byte_tokenizer()(text)["input_ids"]])
    with torch.no_grad():
        before = float(start(input_ids=tokens, labels=tokens).loss)
    assert _loss_of_saved(folder, tokens.tolist()) < before - 0.3
