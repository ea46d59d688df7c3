"""The quickstart as `make train` runs it, whole: it takes a minute or two."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from bigtrain.share import bundled


@pytest.mark.slow
def test_the_quickstart_learns_and_leaves_a_model_that_transformers_loads(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    command = [
        Path(sys.executable).parent / "bigtrain",
        "launch",
        bundled("configs/quickstart.yaml"),
    ]
    done = subprocess.run(
        [*command, "--output-dir", tmp_path / "out"], capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    state = json.loads((tmp_path / "out/checkpoint-150/trainer_state.json").read_text())
    losses = [entry["eval_loss"] for entry in state["log_history"] if "eval_loss" in entry]
    assert losses == sorted(losses, reverse=True)
    assert losses[0] > 5 and losses[-1] < 2.2
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").num_parameters() > 1_000_000
