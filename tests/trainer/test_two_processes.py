"""Two processes, with transformers' own Trainer on the same two (over gloo) as the oracle."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
import transformers

import bigtrain
from bigtrain.topology import RankInfo
from tests.engine.harness import run_ranks
from tests.trainer.samples import Sentences, Stream, arguments, tiny_llama, without_clock

RELATIVE = 1e-6


def _own_loss(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> Any:
    logits = outputs.logits[:, :-1].flatten(0, 1).float()
    total = torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum")
    return total / num_items_in_batch


class Ragged(Sentences):
    """Sentences of unequal lengths."""

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {name: row[: 8 + index % 8] for name, row in super().__getitem__(index).items()}


def _padded(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    pad = torch.nn.utils.rnn.pad_sequence
    return {
        "input_ids": pad([row["input_ids"] for row in rows], batch_first=True),
        "labels": pad([row["labels"] for row in rows], batch_first=True, padding_value=-100),
    }


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulated, with a short last window": {"gradient_accumulation_steps": 3},
    "label smoothing": {"label_smoothing_factor": 0.1},
    "half an epoch": {"num_train_epochs": 0.5},
    "a loss function": {"compute_loss_func": _own_loss, "gradient_accumulation_steps": 2},
    "iterable": {"train_dataset": Stream(20), "max_steps": 6},
    "grouped by length": {
        "train_dataset": Ragged(22),
        "data_collator": _padded,
        "train_sampling_strategy": "group_by_length",
    },
    "a dict of evaluation sets": {"eval_dataset": {"a": Sentences(5), "b": Sentences(4)}},
}
_PARAMETERS = ("train_dataset", "eval_dataset", "data_collator", "compute_loss_func")


def _run(library: Any, folder: str, changed: dict[str, Any]) -> list[dict[str, Any]]:
    given = {"train_dataset": Sentences(22), "eval_dataset": Sentences(5), **changed}
    own = {name: given.pop(name) for name in _PARAMETERS if name in given}
    fields: dict[str, Any] = {
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 2,
        "num_train_epochs": 1.5,
        "learning_rate": 1e-3,
        "eval_strategy": "steps",
        "eval_steps": 4,
        "ddp_backend": "gloo",
        **given,
    }
    args = arguments(folder, kind=library.TrainingArguments, **fields)
    assert args.world_size == 2
    run = library.Trainer(model=tiny_llama(dropout=0.1), args=args, **own)
    run.train()
    return [without_clock(entry) for entry in run.state.log_history]


def _both(world: RankInfo, folder: str) -> dict[str, Any]:
    # accelerate joins ranks on a CPU only when told that it is meant.
    os.environ["ACCELERATE_USE_CPU"] = "true"
    found = {}
    for name, changed in CASES.items():
        pair = (_run(library, folder, changed) for library in (bigtrain, transformers))
        found[name] = tuple(pair)
    return found


@pytest.fixture(scope="module")
def histories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run_ranks(2, _both, str(tmp_path_factory.mktemp("both")))[0]


@pytest.mark.parametrize("name", CASES)
def test_losses_norms_rates_and_metrics_are_transformers(
    histories: dict[str, Any], name: str
) -> None:
    ours, theirs = histories[name]
    assert [entry.keys() for entry in ours] == [entry.keys() for entry in theirs]
    assert len(ours) > 3
    for mine, expected in zip(ours, theirs, strict=True):
        assert mine == pytest.approx(expected, rel=RELATIVE), name
