"""The parameters that must work, by name, and small runs that show what each does.

A test that shows a row is marked `@pytest.mark.shows("row")`, with `on="fsdp"` where it shows it on
an engine with several ranks. `docs/arguments.md` is written from these marks, and
`test_every_row_has_an_effect.py` takes each row's handling away and sees its tests fail.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from bigtrain.trainer.trainer import Trainer
from tests.trainer.samples import Points, Regression, arguments

TRAINER_ROWS = (
    "model",
    "args",
    "data_collator",
    "train_dataset",
    "eval_dataset",
    "processing_class",
    "model_init",
    "compute_loss_func",
    "compute_metrics",
    "callbacks",
    "optimizers",
    "preprocess_logits_for_metrics",
)
ARGUMENT_ROWS = (
    "output_dir",
    "overwrite_output_dir",
    "do_train",
    "do_eval",
    "do_predict",
    "eval_strategy",
    "prediction_loss_only",
    "per_device_train_batch_size",
    "per_device_eval_batch_size",
    "gradient_accumulation_steps",
    "eval_accumulation_steps",
    "eval_delay",
    "torch_empty_cache_steps",
    "learning_rate",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "max_grad_norm",
    "num_train_epochs",
    "max_steps",
    "lr_scheduler_type",
    "lr_scheduler_kwargs",
    "warmup_ratio",
    "warmup_steps",
    "log_level",
    "log_level_replica",
    "log_on_each_node",
    "logging_dir",
    "logging_strategy",
    "logging_first_step",
    "logging_steps",
    "logging_nan_inf_filter",
    "save_strategy",
    "save_steps",
    "save_total_limit",
    "save_safetensors",
    "save_on_each_node",
    "save_only_model",
    "restore_callback_states_from_checkpoint",
    "use_cpu",
    "seed",
    "data_seed",
    "jit_mode_eval",
    "use_ipex",
    "bf16",
    "fp16",
    "fp16_opt_level",
    "fp16_backend",
)
_PARAMETERS = {*TRAINER_ROWS, "optimizer_cls_and_kwargs"} - {"args"}


class Events(TrainerCallback):
    """At which steps an event came."""

    def __init__(self, name: str) -> None:
        self.steps: list[int] = []
        setattr(self, name, self._note)

    def _note(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.steps.append(state.global_step)


class Seen(nn.Module):
    """A regression that notes what came through it: rows, precision, whether it was training."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(4, 1)
        self.rows: list[float] = []
        self.dtypes: set[torch.dtype] = set()

    def forward(self, x: Tensor, labels: Tensor | None = None) -> tuple[Tensor, ...]:
        guess = self.layer(x)
        self.dtypes.add(guess.dtype)
        if self.training:
            self.rows.extend(round(value, 4) for value in x[:, 0].float().tolist())
        guess = guess.float().squeeze(-1)
        return (guess,) if labels is None else (((guess - labels) ** 2).mean(), guess)


def trainer(folder: Path | str, **changed: Any) -> Trainer:
    """A trainer of a regression on 16 points, in batches of 4; `changed` as anyone would say it."""
    own = {name: changed.pop(name) for name in list(changed) if name in _PARAMETERS}
    own.setdefault("model", Seen())
    own.setdefault("train_dataset", Points(16))
    own.setdefault("eval_dataset", Points(12))
    fields: dict[str, Any] = {"warmup_steps": 0, "weight_decay": 0.0, "num_train_epochs": 1}
    return Trainer(args=arguments(folder, **{**fields, **changed}), **own)


def trained(folder: Path | str, **changed: Any) -> Trainer:
    run = trainer(folder, **changed)
    run.train()
    return run


def weights(run: Trainer) -> Tensor:
    return torch.cat([p.detach().flatten().float() for p in run.model.parameters()])


def logged(run: Trainer, key: str) -> list[Any]:
    return [entry[key] for entry in run.state.log_history if key in entry]


def logged_steps(run: Trainer, key: str = "loss") -> list[int]:
    return [entry["step"] for entry in run.state.log_history if key in entry]


def checkpoints(folder: Path) -> list[int]:
    return sorted(int(path.name.split("-")[1]) for path in folder.glob("checkpoint-*"))


def by_hand(*, steps: int = 4, clip: float | None = None, **options: Any) -> Tensor:
    """Weights after AdamW has seen the points in order, four at a time, in plain PyTorch."""
    model, points = Regression(), Points(16)
    decay = options.pop("weight_decay", 0.0)
    groups = [
        {"params": [model.layer.weight], "weight_decay": decay},
        {"params": [model.layer.bias], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, **{"lr": 1e-2, **options})
    for step in range(steps):
        rows = [points[index] for index in range(4 * step, 4 * step + 4)]
        batch = torch.utils.data.default_collate(rows)
        model(**batch)[0].backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()
    return torch.cat([p.detach().flatten() for p in model.parameters()])
