"""How long transformers' Trainer itself takes to save, and to load what it saved.

    bigtrain launch benchmarks/transformers_saves.py --engine fsdp --procs-per-node 2 \
        --output-dir LOGS --env FSDP_STATE_DICT_TYPE=SHARDED_STATE_DICT -- FOLDER 300 3

`benchmarks/save.py` runs it, for its row "transformers' Trainer (FSDP)": the model is the same, the
script knows nothing of bigtrain, and is started by its launcher because accelerate alone takes no
FSDP without a GPU. Seconds of the slowest rank, to FOLDER/answer.json.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

FOLDER, MILLIONS, REPEATS = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
HIDDEN, VOCABULARY = 1024, 32_000


def slowest(value: float) -> float:
    """The largest over all ranks."""
    found = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return float(found)


class Timed(Trainer):
    """Notes what saving and loading take."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.saves: list[float] = []
        self.loads: list[float] = []

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        dist.barrier()
        begun = time.perf_counter()
        super()._save_checkpoint(*args, **kwargs)
        self.saves.append(slowest(time.perf_counter() - begun))

    def _load_from_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        dist.barrier()
        begun = time.perf_counter()
        super()._load_from_checkpoint(*args, **kwargs)
        self.loads.append(slowest(time.perf_counter() - begun))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        dist.barrier()
        begun = time.perf_counter()
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            self.loads.append(slowest(time.perf_counter() - begun))


def trainer(steps: int) -> Timed:
    """One that saves at every step."""
    per_layer = 4 * HIDDEN * HIDDEN + 3 * HIDDEN * 4 * HIDDEN
    layers = max(1, round((MILLIONS * 1e6 - 2 * VOCABULARY * HIDDEN) / per_layer))
    config = LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=4 * HIDDEN,
        num_hidden_layers=layers,
        num_attention_heads=16,
        vocab_size=VOCABULARY,
    )
    rows = [{"input_ids": [1] * 8, "labels": [1] * 8} for _ in range(64)]
    args = TrainingArguments(
        str(FOLDER / "run"),
        max_steps=steps,
        per_device_train_batch_size=1,
        save_strategy="steps",
        save_steps=1,
        save_total_limit=1,
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    return Timed(model=LlamaForCausalLM(config), args=args, train_dataset=rows)  # type: ignore[arg-type]


def main() -> None:
    """Save in a first training, load in a second."""
    first = trainer(REPEATS + 1)
    first.train()
    saves, steps = first.saves[1 : REPEATS + 1], first.state.global_step
    del first
    second = trainer(steps + 1)
    second.train(resume_from_checkpoint=True)
    if dist.get_rank() == 0:
        found = {"blocked": saves, "done": saves, "load": [sum(second.loads)]}
        (FOLDER / "answer.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
