"""`launch/train.py`, the script that people copy, as they run it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "launch" / "train.py"
BIN = Path(sys.executable).parent


@pytest.fixture
def model_dir(make_tiny_llama, byte_tokenizer, tmp_path: Path) -> Path:
    make_tiny_llama(vocab_size=len(byte_tokenizer)).save_pretrained(tmp_path / "model")
    byte_tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text("All that is gold does not glitter. " * 100)
    return tmp_path / "model"


@pytest.mark.parametrize(
    "command",
    [
        [BIN / "bigtrain", "launch", SCRIPT, "--procs-per-node", "2", "--engine", "fsdp", "--"],
        pytest.param([sys.executable, SCRIPT], marks=pytest.mark.slow),
    ],
    ids=["launched", "alone"],
)
def test_it_trains_evaluates_and_predicts_as_its_flags_say(
    model_dir: Path, command: list[object]
) -> None:
    flags = [
        *("--model", "model", "--train_files", "text.txt", "--eval_files", "text.txt"),
        *("--predict_files", "text.txt", "--sequence_length", "32", "--cache_dir", "cache"),
        *("--output_dir", "out", "--do_train", "--do_eval", "--do_predict", "--use_cpu"),
        *("--prediction_loss_only", "--max_steps", "3", "--learning_rate", "0.01"),
        *("--save_strategy", "no", "--logging_steps", "1"),
    ]

    done = subprocess.run(
        [str(part) for part in (*command, *flags)],
        cwd=model_dir.parent,
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )

    out = model_dir.parent / "out"
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    assert (out / "model.safetensors").is_file()
    assert json.loads((out / "eval_results.json").read_text())["eval_loss"] < 5.5
    assert (out / "predict_results.json").is_file()
