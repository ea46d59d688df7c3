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


def test_a_scripts_run_goes_on_as_the_launcher_is_told(tmp_path: Path, make_tiny_llama) -> None:
    (tmp_path / "script.py").write_text(
        "import torch\n"
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "from bigtrain import Trainer, TrainingArguments\n"
        "config = LlamaConfig(vocab_size=16, hidden_size=16, intermediate_size=16,\n"
        "    num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2)\n"
        "data = [{'input_ids': torch.arange(8), 'labels': torch.arange(8)} for _ in range(16)]\n"
        "args = TrainingArguments(output_dir='out', max_steps=4, save_steps=2, use_cpu=True,\n"
        "    per_device_train_batch_size=2, report_to='none', disable_tqdm=True)\n"
        "trainer = Trainer(model=LlamaForCausalLM(config), args=args, train_dataset=data)\n"
        "trainer.train()\n"
        "print('began at', trainer._initial_global_step)\n"
    )

    def launch(*flags: str) -> str:
        done = subprocess.run(
            [str(BIN / "bigtrain"), "launch", "script.py", *flags],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
        return done.stdout

    def first_step(*flags: str) -> str:
        return launch(*flags).rpartition("began at ")[2].strip()

    assert launch().count("training 4 steps") == 1
    again = launch()
    assert again.endswith("began at 0\n"), "the script asked for nothing"
    assert again.count("warning: out holds 2 checkpoints of an earlier run (to step 4)") == 1
    assert launch("--resume", "auto").count("going on from out/checkpoint-4") == 1
    assert first_step("--resume", "auto") == "4", "all is done"
    assert not (tmp_path / "out" / "checkpoint-5").exists()
    assert first_step("--resume", "out/checkpoint-2") == "2"
    assert first_step("--resume", "never") == "0"
