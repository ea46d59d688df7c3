"""A script as people have it: TRL's SFTTrainer, which extends transformers' Trainer."""

import json
from pathlib import Path

from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer, TrlParser


def main() -> None:
    (args,) = TrlParser((SFTConfig,)).parse_args_and_config()
    # Model and tokenizer lie beside the output.
    folder = Path(args.output_dir).parent / "model"
    rows = [{"text": f"the number {i} is followed by {i + 1}. " * 3} for i in range(48)]
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(folder),
        args=args,
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(folder),
    )
    trainer.train()
    trainer.save_model(args.output_dir)
    logged = trainer.state.log_history
    seen = {
        "world": args.world_size,
        "kind": str(args.distributed_state.distributed_type),
        "losses": {entry["step"]: entry["loss"] for entry in logged if "loss" in entry},
        "accuracies": [e["mean_token_accuracy"] for e in logged if "mean_token_accuracy" in e],
    }
    Path(args.output_dir, f"rank-{args.process_index}.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    main()
