"""Writes docs/arguments.md: `python -m tests.arguments.documentation`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import transformers

from bigtrain.arguments.schema import load_schema
from bigtrain.trainer.trainer import Trainer
from bigtrain.translate.fates import FATES
from tests.arguments.rows import ARGUMENT_ROWS, TRAINER_ROWS
from tests.arguments.test_every_row_has_an_effect import showing

PATH = Path(__file__).parents[2] / "docs" / "arguments.md"

HEAD = """# Trainer and TrainingArguments

<!-- Written by `python -m tests.arguments.documentation` from the code and its tests. -->

`bigtrain.Trainer` and `bigtrain.TrainingArguments` take what those of transformers take, and mean
the same. Where sharding could change what an argument does, two ranks of FSDP are compared with one
process. `make test-full` ignores each parameter in turn and sees its tests fail.
"""
TRAINER_MEANING = {
    "model": "what is trained: any `torch.nn.Module`; on sharded engines each rank keeps its part",
    "args": "a `TrainingArguments`, bigtrain's or transformers'; default `tmp_trainer`",
    "data_collator": "makes a batch of samples, on every rank of its own share",
    "train_dataset": "cut into shares of equal size; of an iterable every rank reads all",
    "eval_dataset": "one, or a dict whose keys prefix the metrics; samples that fill up the last "
    "batch do not count",
    "processing_class": "pads, and is saved with the model by rank 0",
    "model_init": "makes the model at each `train()`",
    "compute_loss_func": "(outputs, labels, items of the window over all ranks) → loss",
    "compute_metrics": "called on every rank, with the predictions of all",
    "callbacks": "transformers' own class; `on_save` comes after the commit",
    "optimizers": "(optimizer, scheduler), made on the whole model; its parameters are exchanged "
    "for the shards",
    "preprocess_logits_for_metrics": "before the ranks' logits are gathered",
}
WHERE = {
    "bf16": "single, ddp: autocast over fp32 masters. fsdp: layers are gathered in bf16. zero: "
    "DeepSpeed's bf16 with fp32 masters",
    "fp16": "as bf16, with a loss scale whose overflow all ranks agree on; DeepSpeed refuses it on "
    "a CPU",
    "jit_mode_eval": "single and ddp; refused on sharded engines, where no rank has the model",
    "save_safetensors": "the exported model; checkpoints of sharded engines are torch DCP",
    "save_on_each_node": "each node keeps what its ranks need; coming back takes the same nodes",
    "max_grad_norm": "the norm over all shards; DeepSpeed clips in its own step",
    "gradient_accumulation_steps": "one reduction a window where the engine can: ddp and fsdp skip "
    "it in between, ZeRO 2 and 3 reduce every micro-batch",
    "fp16_opt_level": "single, ddp: O1 is autocast, O2 computes with fp16 weights cast from fp32 "
    "masters, O3 keeps fp16 weights and optimizer state alone. fsdp: layers are gathered in fp16, "
    "from fp32 masters (O1, O2) or fp16 ones (O3). zero: DeepSpeed's fp16 with fp32 masters (O1, "
    "O2); O3 is refused",
}
_OF_DDP = "ddp's own; no effect on other engines"
# Where what becomes of an argument is not the same on all engines.
OTHERS = {
    "ddp_backend": "follows from the device: gloo on CPUs, nccl on GPUs; another one is refused",
    "ddp_broadcast_buffers": _OF_DDP,
    "ddp_bucket_cap_mb": _OF_DDP,
    "ddp_find_unused_parameters": _OF_DDP,
    "ddp_static_graph": _OF_DDP,
}
DIFFERENCES = """
`trainer.accelerator` answers what scripts ask accelerate's `Accelerator` for (place, gather,
loaders, `save`, `main_process_first`, `skip_first_batches`, …); what it lacks says by name what
to do instead.

## Where bigtrain differs on purpose

- **transformers' own arguments** may be given: the object becomes bigtrain's and stays yours,
  so that later changes to it count; a dataclass over transformers' class keeps its fields and
  methods.
- **Seq2SeqTrainer on a set that does not divide by the batch** counts every sample once;
  transformers' counts a short last batch as a whole one, so its `eval_loss` is another.
  Predictions are as wide as the longest generation that was asked for.
- **A model in bf16 or fp16** is trained on fp32 masters of what it learns with, whatever it came
  in, and saved in the precision that it came in; transformers' updates such weights themselves.
  On single and ddp one in float64 stays that.
- **An evaluation set without a length** counts every sample once too. Among several ranks that
  holds for all sets, and for loaders of your own: a batch's loss counts by its samples.
- **`output_dir` holds `.bigtrain-lease/`** while a training that saves runs in it, and no longer
  when `train()` has returned or raised (that of a killed one goes with the next). It keeps a second
  run out, also one of another host, which sees nothing but the directory: a file lock over NFS
  proves nothing.
- **An override of `_save` or `save_model`** is called while a checkpoint is made: the directory
  that it gets is a staging one, which gets the name `checkpoint-<step>` when all is written,
  and only the main process calls it. Sharded engines write their own files, and call neither
  there.
- **An override of `_load_from_checkpoint`** is called when each rank has read its own bytes,
  and adds to that.
- **A metric that does not exist** is named at construction where the keys are known, that is
  without `compute_metrics`, callbacks and overridden evaluation; with them at the first
  evaluation, which `eval_on_start` puts before the first step.
- **An edited `trainer_state.json`** counts, with a warning; every other file of a checkpoint's
  state must be as it was written. (A single bit that differs is damage, unless the checkpoint was
  given by its path.)
- **Data without a length that is read in several passes** goes on within its pass at a resume;
  transformers' starts it anew.
- **The last window of such data**, when it is short of `gradient_accumulation_steps`, makes a
  step; transformers' carries its gradients into the next pass.
"""


def document() -> str:
    """The page's text."""
    tables = [*_table("Trainer", TRAINER_ROWS), *_table("TrainingArguments", ARGUMENT_ROWS)]
    return "\n".join([HEAD, *tables, *_others(), "", *_methods(), DIFFERENCES])


def _table(title: str, rows: tuple[str, ...]) -> Iterator[str]:
    yield f"## {title}\n"
    yield "| parameter | what it does | by engine | shown by |"
    yield "|---|---|---|---|"
    for row in rows:
        what = TRAINER_MEANING.get(row) or FATES[row].detail
        yield f"| `{row}` | {what} | {WHERE.get(row, 'the same on all')} | {_shown(row)} |"
    yield ""


def _shown(row: str) -> str:
    alone, sharded = showing(row), showing(row, "fsdp")
    tests = [f"`{test.removeprefix('tests/arguments/')}`" for test in dict.fromkeys(alone)]
    tests += [f"fsdp: `{t.removeprefix('tests/arguments/')}`" for t in dict.fromkeys(sharded)]
    return "<br>".join(tests)


def _others() -> Iterator[str]:
    yield "## The rest of TrainingArguments\n"
    yield "| argument | what becomes of it |"
    yield "|---|---|"
    for name in sorted(set(load_schema()) - set(ARGUMENT_ROWS)):
        rule = FATES[name]
        kind = {"refused": "refused: ", "no_effect": "no effect: "}.get(rule.fate, "")
        yield f"| `{name}` | {OTHERS.get(name, kind + rule.detail)} |"


def _methods() -> Iterator[str]:
    names = [n for n, v in vars(transformers.Trainer).items() if callable(v) and n[:2] != "__"]
    called = [f"`{name}`" for name in names if hasattr(Trainer, name)]
    never = [f"`{name}`" for name in names if not hasattr(Trainer, name)]
    yield "## Methods\n"
    yield "These can be called and overridden as in transformers: " + ", ".join(called) + ".\n"
    yield "These belong to transformers' own loop; overriding one is warned about, since nothing "
    yield "calls it here: " + ", ".join(never) + "."


if __name__ == "__main__":
    PATH.write_text(document(), encoding="utf-8")
