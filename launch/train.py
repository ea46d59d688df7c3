"""Train a causal language model on text files: a script to copy and change.

    bigtrain launch launch/train.py --procs-per-node 2 --engine fsdp -- \
        --model Qwen/Qwen3-0.6B --train_files data/*.jsonl --output_dir runs/mine --do_train

Every TrainingArguments field is a flag. It runs under torchrun too, and alone.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    HfArgumentParser,
    default_data_collator,
)

from bigtrain import Trainer, TrainingArguments
from bigtrain.data.prepare import prepare


@dataclass
class ScriptArguments:
    """What this script takes besides TrainingArguments."""

    model: str = field(metadata={"help": "Hub id or directory of the model to start from."})
    train_files: list[str] = field(metadata={"help": "Files or globs: txt, jsonl, parquet, csv."})
    eval_files: list[str] = field(default_factory=list, metadata={"help": "To evaluate on."})
    predict_files: list[str] = field(default_factory=list, metadata={"help": "For --do_predict."})
    sequence_length: int = field(default=1024, metadata={"help": "Tokens per sample."})
    cache_dir: str = field(default="~/.cache/bigtrain/data", metadata={"help": "Prepared data."})


def main() -> None:
    """Parse, prepare, train, evaluate, predict: as the flags say."""
    parser = HfArgumentParser((ScriptArguments, TrainingArguments))
    script, args = parser.parse_args_into_dataclasses()
    tokenizer = AutoTokenizer.from_pretrained(script.model)

    def packed(files: list[str]):
        """The files as packed sequences; made once, mapped by every process."""
        section = {"train_files": files, "sequence_length": script.sequence_length}
        cache = Path(script.cache_dir).expanduser()
        return prepare(section, tokenizer, cache_root=cache, root=Path.cwd()).train

    trainer = Trainer(
        model=AutoModelForCausalLM.from_pretrained(script.model),
        args=args,
        train_dataset=packed(script.train_files) if args.do_train else None,
        eval_dataset=packed(script.eval_files) if script.eval_files else None,
        processing_class=tokenizer,
        data_collator=default_data_collator,
    )
    if args.do_train:
        result = trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
        trainer.save_model()
        trainer.log_metrics("train", result.metrics)
        trainer.save_metrics("train", result.metrics)
    if args.do_eval:
        metrics = trainer.evaluate()
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics)
    if args.do_predict:
        metrics = trainer.predict(packed(script.predict_files)).metrics
        trainer.log_metrics("predict", metrics)
        trainer.save_metrics("predict", metrics)


if __name__ == "__main__":
    main()
