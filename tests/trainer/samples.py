"""What the trainer's tests train: tiny models and data, and records that can be compared."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, IterableDataset
from transformers import LlamaConfig, LlamaForCausalLM

from bigtrain.trainer.arguments import TrainingArguments
from bigtrain.trainer.trainer import Trainer

VOCABULARY, LENGTH = 64, 16
# What a clock wrote, and so differs between any two runs.
CLOCKED = ("runtime", "per_second", "preparation_time")


def tiny_llama(*, seed: int = 0, dropout: float = 0.0, **config: Any) -> LlamaForCausalLM:
    fields = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 64,
        "attention_dropout": dropout,
    } | config
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(LlamaConfig(**fields))


class Sentences(Dataset[dict[str, Tensor]]):
    """Rows of random tokens, of which an uneven number count for the loss."""

    def __init__(self, count: int, *, seed: int = 1) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.rows = torch.randint(0, VOCABULARY, (count, LENGTH), generator=generator)
        self.loaded: list[int] = []

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        self.loaded.append(index)
        labels = self.rows[index].clone()
        labels[: index % 7] = -100
        return {"input_ids": self.rows[index], "labels": labels}


class Stream(IterableDataset[dict[str, Tensor]]):
    """The same rows without a length."""

    def __init__(self, count: int) -> None:
        self.rows = Sentences(count)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return (self.rows[index] for index in range(len(self.rows)))


class Regression(nn.Module):
    """A plain module that returns a tuple, and knows nothing of transformers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(4, 1)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> tuple[Tensor, ...]:
        guess = self.layer(x).squeeze(-1)
        return (guess,) if labels is None else (((guess - labels) ** 2).mean(), guess)


class Points(Dataset[dict[str, Tensor]]):
    """Samples for `Regression`."""

    def __init__(self, count: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(count, 4, generator=generator)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"x": self.x[index], "labels": self.x[index].sum()}


def arguments(folder: Path | str, *, kind: type = TrainingArguments, **changed: Any) -> Any:
    """Short runs on the CPU that log every step and save nothing unless told so."""
    fields: dict[str, Any] = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "num_train_epochs": 2,
        "learning_rate": 1e-2,
        "weight_decay": 0.1,
        "warmup_steps": 2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
    } | changed
    return kind(**fields)


def trainer(folder: Path | str, *, data: Any = None, **changed: Any) -> Trainer:
    """A trainer of the tiny Llama; `changed` are arguments or the trainer's own parameters."""
    own = {name: changed.pop(name) for name in _TRAINER_PARAMETERS if name in changed}
    if "model_init" not in own:
        own.setdefault("model", tiny_llama())
    data = Sentences(22) if data is None else data
    return Trainer(args=arguments(folder, **changed), train_dataset=data, **own)


_TRAINER_PARAMETERS = (
    "model",
    "model_init",
    "eval_dataset",
    "callbacks",
    "compute_metrics",
    "compute_loss_func",
    "processing_class",
    "optimizers",
    "data_collator",
)


def history(run: Any) -> list[dict[str, Any]]:
    """All that a run logged, but what a clock wrote."""
    return [without_clock(entry) for entry in run.state.log_history]


def without_clock(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {key: v for key, v in entry.items() if not any(part in key for part in CLOCKED)}


def losses(run: Any) -> list[tuple[float, float]]:
    """Loss and gradient norm of every logged step."""
    logged = [entry for entry in run.state.log_history if "loss" in entry]
    return [(entry["loss"], entry["grad_norm"]) for entry in logged]


def same_weights(one: nn.Module, other: nn.Module) -> bool:
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)
