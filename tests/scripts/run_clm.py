"""A script as people have it: it goes as transformers' run_clm.py (examples/pytorch) does.
Arguments come from HfArgumentParser, a text file is tokenized and grouped into blocks, the
Trainer goes on from the last checkpoint, saves, and evaluates."""

import json
import math
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

import torch
from datasets import load_dataset
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint


@dataclass
class ModelArguments:
    """Which model."""

    model_name_or_path: str = field(metadata={"help": "the model and its tokenizer"})
    dtype: str | None = field(default=None, metadata={"choices": ["auto", "bfloat16", "float32"]})


@dataclass
class DataTrainingArguments:
    """Which text."""

    train_file: str = field(metadata={"help": "a text file"})
    validation_file: str = field(metadata={"help": "a text file"})
    block_size: int = field(default=32)
    max_eval_samples: int | None = field(default=None)


def preprocess_logits(logits, labels):
    return (logits[0] if isinstance(logits, tuple) else logits).argmax(dim=-1)


def accuracy(prediction) -> dict[str, float]:
    guesses, labels = prediction.predictions[:, :-1], prediction.label_ids[:, 1:]
    return {"accuracy": float((guesses == labels)[labels != -100].mean())}


def main() -> None:
    parser = HfArgumentParser((ModelArguments, DataTrainingArguments, TrainingArguments))
    model_args, data_args, training_args = parser.parse_args_into_dataclasses()
    set_seed(training_args.seed)

    files = {"train": data_args.train_file, "validation": data_args.validation_file}
    cache = str(Path(training_args.output_dir).parent / "cache")
    raw = load_dataset("text", data_files=files, cache_dir=cache)
    tokenizer = AutoTokenizer.from_pretrained(model_args.model_name_or_path)
    config = AutoConfig.from_pretrained(model_args.model_name_or_path)
    model = AutoModelForCausalLM.from_pretrained(
        model_args.model_name_or_path, config=config, dtype=model_args.dtype
    )

    def group(examples):
        whole = {key: list(chain(*examples[key])) for key in examples}
        total = len(whole["input_ids"]) // data_args.block_size * data_args.block_size
        blocks = {
            key: [rows[i : i + data_args.block_size] for i in range(0, total, data_args.block_size)]
            for key, rows in whole.items()
        }
        blocks["labels"] = blocks["input_ids"].copy()
        return blocks

    with training_args.main_process_first(desc="dataset map tokenization"):
        tokens = raw.map(lambda rows: tokenizer(rows["text"]), batched=True, remove_columns="text")
        blocks = tokens.map(group, batched=True)
    evaluated = blocks["validation"]
    if data_args.max_eval_samples is not None:
        evaluated = evaluated.select(range(min(len(evaluated), data_args.max_eval_samples)))

    trainer = Trainer(
        model=model,
        args=training_args,
        train_dataset=blocks["train"] if training_args.do_train else None,
        eval_dataset=evaluated if training_args.do_eval else None,
        processing_class=tokenizer,
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
        compute_metrics=accuracy,
        preprocess_logits_for_metrics=preprocess_logits,
    )

    if training_args.do_train:
        last = training_args.resume_from_checkpoint
        if last is None and Path(training_args.output_dir).is_dir():
            last = get_last_checkpoint(training_args.output_dir)
        result = trainer.train(resume_from_checkpoint=last)
        trainer.save_model()
        metrics = result.metrics | {"train_samples": len(blocks["train"])}
        trainer.log_metrics("train", metrics)
        trainer.save_metrics("train", metrics)
        trainer.save_state()

    if training_args.do_eval:
        metrics = trainer.evaluate()
        metrics["perplexity"] = math.exp(metrics["eval_loss"])
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics)

    _leave_a_note(trainer, training_args)


def _leave_a_note(trainer: Trainer, args: TrainingArguments) -> None:
    """What the test looks at; the only part that such scripts don't have."""
    seen = {
        "world": args.world_size,
        "kind": str(args.distributed_state.distributed_type),
        "elements": sum(_held(parameter) for parameter in trainer.model.parameters()),
        "losses": {e["step"]: e["loss"] for e in trainer.state.log_history if "loss" in e},
        "evaluated": [e["eval_loss"] for e in trainer.state.log_history if "eval_loss" in e],
    }
    Path(args.output_dir, f"rank-{args.process_index}.json").write_text(json.dumps(seen))


def _held(parameter: torch.nn.Parameter) -> int:
    """Elements of it that this rank has."""
    if hasattr(parameter, "ds_tensor"):
        return parameter.ds_tensor.numel()
    return (parameter.to_local() if hasattr(parameter, "to_local") else parameter).numel()


if __name__ == "__main__":
    main()
