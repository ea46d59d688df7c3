"""A script as people have it: a Trainer of transformers', extended as TRL and others extend it, and
not a word about processes."""

import json
import sys
from pathlib import Path

import torch
from torch.utils.data import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments


class Tokens(Dataset):
    """Sixteen sequences that are always the same."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.rows = torch.randint(0, 64, (16, 16), generator=generator)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.rows[index], "labels": self.rows[index]}


class Witness(TrainerCallback):
    """Writes down what trained, and how."""

    def on_train_end(self, args, state, control, **kwargs) -> None:
        model = kwargs["model"]
        inner = model.module if hasattr(model, "module") else model
        parameter = next(inner.parameters())
        seen = {
            "world": args.world_size,
            "kind": str(args.distributed_state.distributed_type),
            "parameter": type(parameter).__name__,
            "is_cut": hasattr(parameter, "ds_tensor") or hasattr(parameter, "device_mesh"),
            "optimizer": type(kwargs["optimizer"]).__name__,
            "losses": [entry["loss"] for entry in state.log_history if "loss" in entry],
        }
        Path(sys.argv[1], f"rank-{args.process_index}.json").write_text(json.dumps(seen))


class OwnLoss(Trainer):
    """Computes the loss itself."""

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        logits = outputs.logits[:, :-1].flatten(0, 1).float()
        loss = torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten())
        return (loss, outputs) if return_outputs else loss


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
    args = TrainingArguments(
        output_dir=str(Path(sys.argv[1], "out")),
        per_device_train_batch_size=2,
        max_steps=3,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        learning_rate=1e-2,
        disable_tqdm=True,
        bf16="--bf16" in sys.argv,
        use_cpu="--use_cpu" in sys.argv,
    )
    OwnLoss(model=model, args=args, train_dataset=Tokens(), callbacks=[Witness()]).train()


if __name__ == "__main__":
    main()
