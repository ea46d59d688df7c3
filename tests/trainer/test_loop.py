"""What a step costs beyond the model's own work, and that the loop's memory stays flat."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader
from transformers import TrainerCallback, default_data_collator

from tests.trainer.samples import Sentences, tiny_llama, trainer

STEPS = 6


class HostReads(TorchDispatchMode):
    """Counts how often a value is read from the device: each is a wait for it."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


class CountPerStep(TrainerCallback):
    """Reads in each step, from its end to the next one's."""

    def __init__(self, reads: HostReads) -> None:
        self.reads = reads
        self.at_end: list[int] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.at_end.append(self.reads.count)


def bare_reads() -> int:
    """Reads of one step of a loop that is written by hand."""
    model = tiny_llama(use_cache=False)  # as a trainer has it
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    loader = DataLoader(Sentences(4 * STEPS), batch_size=4, collate_fn=default_data_collator)
    counts = []
    with HostReads() as reads:
        for batch in loader:
            items = batch["labels"][..., 1:].ne(-100).sum()
            model(**batch, num_items_in_batch=items).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            counts.append(reads.count)
    return counts[3] - counts[2]


def test_a_step_reads_the_device_as_often_as_a_bare_loop(tmp_path: Path) -> None:
    reads = HostReads()
    counter = CountPerStep(reads)
    run = trainer(
        tmp_path,
        data=Sentences(4 * STEPS),
        callbacks=[counter],
        num_train_epochs=1,
        logging_strategy="no",
    )
    with reads:
        run.train()
    ends = counter.at_end
    per_step = [late - early for early, late in itertools.pairwise(ends)]
    assert per_step == [bare_reads()] * (STEPS - 1)


def test_the_cache_is_emptied_every_so_many_steps(tmp_path: Path, monkeypatch: Any) -> None:
    emptied = []
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "empty_cache", lambda: emptied.append(None))
    run = trainer(tmp_path, max_steps=6, torch_empty_cache_steps=3)
    run.train()
    assert len(emptied) == 2


def test_a_short_last_window_counts_as_its_own_items(tmp_path: Path) -> None:
    """5 batches in windows of 2: the last window's loss is the mean over its tokens alone."""
    run = trainer(
        tmp_path,
        data=Sentences(20),
        gradient_accumulation_steps=2,
        num_train_epochs=1,
        learning_rate=0.0,
        train_sampling_strategy="sequential",
    )
    run.train()
    logged = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    model = tiny_llama().eval()
    rows = [run.train_dataset[index] for index in range(16, 20)]
    batch = default_data_collator(rows)
    torch.testing.assert_close(torch.tensor(logged[2]), model(**batch).loss.detach())


def test_skipped_steps_of_fp16_do_not_move_the_schedule(tmp_path: Path) -> None:
    class Overflow(TrainerCallback):
        """Makes the second step's gradients infinite."""

        def on_substep_end(self, *args: Any, **kwargs: Any) -> None:
            raise AssertionError("windows have one batch here")

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            weight = next(iter(kwargs["model"].parameters()))
            weight.register_hook(lambda grad: grad * float("inf")) if state.global_step == 1 else 0
            if state.global_step == 2:
                weight._backward_hooks.clear()

    run = trainer(tmp_path, fp16=True, max_steps=4, callbacks=[Overflow()], warmup_steps=0)
    run.train()
    rates = [e["learning_rate"] for e in run.state.log_history if "learning_rate" in e]
    assert run.state.global_step == 4
    assert rates[1] == rates[2] > rates[3]


@pytest.mark.parametrize("count", [0, 3])
def test_data_without_a_single_batch_is_a_mistake(tmp_path: Path, count: int) -> None:
    run = trainer(tmp_path, data=Sentences(count), train_sampling_strategy="sequential")
    run.args.dataloader_drop_last = True
    with pytest.raises(ValueError, match="it has no batch at all"):
        run.train()
