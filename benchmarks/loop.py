"""What the training loop costs: a bare PyTorch loop, transformers' Trainer and bigtrain's.

    python benchmarks/loop.py [--steps 200] [--repeats 10] [--json]
    python benchmarks/loop.py --memory 10000

All three train the same tiny Llama on the same batches with the same optimizer and clipping, one
process, in turns, so that a busy machine slows all alike. The figure is the milliseconds of an
optimizer step, and beside it those that the processor spent on it, which other programs on a busy
machine disturb less; the target is at most 1.03 times the bare loop's. `--memory` trains so many
steps and tells by how much the process has grown after its first tenth.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import psutil
import torch
import transformers
from torch.utils.data import DataLoader, Dataset
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback, default_data_collator

from bigtrain.trainer.arguments import TrainingArguments
from bigtrain.trainer.trainer import Trainer

BATCH, LENGTH, VOCABULARY = 4, 32, 64
WARMUP_STEPS = 20
TARGETS = {"no logging": 1.03, "logging every 10 steps": 1.03}


class Tokens(Dataset[dict[str, torch.Tensor]]):
    """Random sequences, made beforehand."""

    def __init__(self, count: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.rows = torch.randint(0, VOCABULARY, (count, LENGTH), generator=generator)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.rows[index], "labels": self.rows[index]}


@dataclass(frozen=True)
class Took:
    """Seconds on the wall, and of the processor for this process."""

    wall: float = 0.0
    processor: float = 0.0

    def __sub__(self, other: Took) -> Took:
        return Took(self.wall - other.wall, self.processor - other.processor)


def now() -> Took:
    """The two clocks."""
    return Took(time.perf_counter(), time.process_time())


class Clock(TrainerCallback):
    """Times the steps after the warm-up."""

    def __init__(self) -> None:
        self.took = Took()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == WARMUP_STEPS:
            self.began = now()
        elif state.global_step == state.max_steps:
            self.took = now() - self.began


def make_model() -> LlamaForCausalLM:
    """The tiny Llama that all three train."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=VOCABULARY,
        max_position_embeddings=LENGTH,
    )
    config.use_cache = False
    return LlamaForCausalLM(config)


def bare(data: Tokens, steps: int, _: int | None) -> Took:
    """The loop as one would write it by hand, normalised by tokens, with a schedule."""
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    loader = DataLoader(data, batch_size=BATCH, shuffle=True, collate_fn=default_data_collator)
    model.train()
    began = now()
    for step, batch in enumerate(loader, start=1):
        items = batch["labels"][..., 1:].ne(-100).sum()
        loss = model(**batch, num_items_in_batch=items).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step == WARMUP_STEPS:
            began = now()
    return now() - began


def with_trainer(trainer_class: Any, arguments_class: Any) -> Callable[..., Took]:
    """The same by a Trainer."""

    def run(data: Tokens, steps: int, logging_steps: int | None) -> Took:
        clock = Clock()
        with tempfile.TemporaryDirectory() as folder:
            args = arguments_class(
                output_dir=folder,
                per_device_train_batch_size=BATCH,
                max_steps=steps,
                learning_rate=1e-3,
                logging_strategy="no" if logging_steps is None else "steps",
                logging_steps=logging_steps or steps,
                save_strategy="no",
                use_cpu=True,
                disable_tqdm=True,
                report_to="none",
            )
            trainer = trainer_class(
                model=make_model(), args=args, train_dataset=data, callbacks=[clock]
            )
            trainer.remove_callback(transformers.PrinterCallback)
            trainer.train()
        return clock.took

    return run


class Footprint(TrainerCallback):
    """Resident bytes of the process after a tenth of the steps, and after all."""

    def __init__(self) -> None:
        self.early = self.late = 0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == state.max_steps // 10:
            self.early = _resident()
        elif state.global_step == state.max_steps:
            self.late = _resident()


def _resident() -> int:
    gc.collect()
    return int(psutil.Process().memory_info().rss)


def grown(steps: int) -> tuple[int, int]:
    """Resident bytes early and late in a long training that logs every 10 steps."""
    footprint = Footprint()
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=BATCH,
            max_steps=steps,
            logging_steps=10,
            save_strategy="no",
            use_cpu=True,
            disable_tqdm=True,
            report_to="none",
        )
        trainer = Trainer(
            model=make_model(), args=args, train_dataset=Tokens(400), callbacks=[footprint]
        )
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()
    return footprint.early, footprint.late


LOOPS: dict[str, Callable[..., Took]] = {
    "bare": bare,
    "transformers": with_trainer(transformers.Trainer, transformers.TrainingArguments),
    "bigtrain": with_trainer(Trainer, TrainingArguments),
}


def measure(steps: int, repeats: int, logging_steps: int | None) -> dict[str, list[Took]]:
    """Milliseconds a step, of every loop in every repeat."""
    data = Tokens(BATCH * steps)
    figures: dict[str, list[Took]] = {name: [] for name in LOOPS}
    names = list(LOOPS)
    for repeat in range(repeats):
        # Another order each time: nobody always follows the same neighbour.
        for name in names[repeat % 3 :] + names[: repeat % 3]:
            gc.collect()
            took = LOOPS[name](data, steps, logging_steps)
            scale = 1000 / (steps - WARMUP_STEPS)
            figures[name].append(Took(scale * took.wall, scale * took.processor))
    return figures


def summary(figures: dict[str, list[Took]], name: str) -> dict[str, float]:
    """Medians over the repeats: of the times, and of their ratios to the bare loop's beside."""
    row = {}
    for clock in ("wall", "processor"):
        own = [getattr(took, clock) for took in figures[name]]
        beside = [getattr(took, clock) for took in figures["bare"]]
        row[f"{clock}_ms"] = statistics.median(own)
        row[f"{clock}_ratio"] = statistics.median(
            one / bare for one, bare in zip(own, beside, strict=True)
        )
    return row


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--memory", type=int, metavar="STEPS", help="Watch the memory instead.")
    options = parser.parse_args()
    logging.getLogger("bigtrain").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    if options.memory:
        early, late = grown(options.memory)
        print(
            f"{options.memory} steps: {early / 1e6:.1f} MB after a tenth, {late / 1e6:.1f} MB "
            f"after all; {(late - early) / (0.9 * options.memory):.0f} bytes a step"
        )
        return
    report = {}
    for title, every in (("no logging", None), ("logging every 10 steps", 10)):
        figures = measure(options.steps, options.repeats, every)
        report[title] = {name: summary(figures, name) for name in figures}
    if options.json:
        print(json.dumps(report, indent=2))
        return
    for title, rows in report.items():
        print(f"{title} (target for bigtrain: {TARGETS[title]:.2f}× bare)")
        for name, row in rows.items():
            print(
                f"  {name:14}{row['wall_ms']:8.3f} ms a step, {row['wall_ratio']:.3f}× bare;"
                f" processor{row['processor_ms']:8.3f} ms, {row['processor_ratio']:.3f}×"
            )


if __name__ == "__main__":
    main()
