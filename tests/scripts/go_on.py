"""A script that trains, saves, and leaves its losses: with transformers' Trainer or bigtrain's.

go_on.py FOLDER transformers|bigtrain STEPS RANKS
"""

import importlib
import json
import sys
from pathlib import Path

import torch
from torch.utils.data import Dataset
from transformers import LlamaConfig, LlamaForCausalLM

# By name: a script that names bigtrain is not given what accelerate reads.
library = importlib.import_module(sys.argv[2])
FOLDER, STEPS = Path(sys.argv[1]), int(sys.argv[3])


class Tokens(Dataset):
    """Forty-eight sequences that are always the same."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.rows = torch.randint(0, 64, (48, 16), generator=generator)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.rows[index], "labels": self.rows[index]}


def main() -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            vocab_size=64,
        )
    )
    args = library.TrainingArguments(
        output_dir=str(FOLDER / sys.argv[2]),
        per_device_train_batch_size=12 // int(sys.argv[4]),
        max_steps=STEPS,
        logging_steps=1,
        save_strategy="steps",
        save_steps=3,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=2,
        weight_decay=0.1,
        report_to=[],
        learning_rate=1e-2,
        disable_tqdm=True,
    )
    trainer = library.Trainer(model=model, args=args, train_dataset=Tokens())
    trainer.train()
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    if trainer.is_world_process_zero():
        (FOLDER / f"{sys.argv[2]}.json").write_text(json.dumps(logged))


if __name__ == "__main__":
    main()
