"""Values that contradict each other or can't be: what transformers refuses when it makes the
arguments, told before anything is queued.

The rules are those of `TrainingArguments._validate_args` in transformers' training_args.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from bigtrain.arguments.reporters import reporters
from bigtrain.arguments.values import did_you_mean

Fault = tuple[str, str]
"""(an argument, what is wrong with it and the mending)"""

_CADENCES = (
    ("logging_strategy", "logging_steps"),
    ("eval_strategy", "eval_steps"),
    ("save_strategy", "save_steps"),
)
_NEED_AN_EVALUATION = ("reduce_lr_on_plateau", "greedy")


def faults(values: Mapping[str, Any]) -> Iterator[Fault]:
    """All of them. `values` are those of every argument."""
    yield from _of_cadences(values)
    yield from _of_best_model(values)
    yield from _of_numbers(values)
    yield from _of_reporters(values["report_to"])
    scheduler = values["lr_scheduler_type"]
    if scheduler in _NEED_AN_EVALUATION and values["eval_strategy"] == "no":
        yield "lr_scheduler_type", f"{scheduler!r} follows evaluations; set eval_strategy"


def _of_cadences(values: Mapping[str, Any]) -> Iterator[Fault]:
    for strategy, argument in _CADENCES:
        steps = _steps(values, argument)
        if values[strategy] != "steps" or steps is None:
            continue
        if steps <= 0:
            yield argument, f"{steps:g} is no number of steps; give 1 or more, or a share of all"
        elif steps > 1 and steps != int(steps):
            yield argument, f"{steps:g} steps is no whole number"


def _of_best_model(values: Mapping[str, Any]) -> Iterator[Fault]:
    evaluates, saves = values["eval_strategy"], values["save_strategy"]
    if not values["load_best_model_at_end"] or saves == "best":
        return
    name = "load_best_model_at_end"
    if evaluates != saves:
        yield (
            name,
            (
                f"save_strategy ({saves}) and eval_strategy ({evaluates}) have to be the same, or "
                "save_strategy best"
            ),
        )
        return
    every, saved = _steps(values, "eval_steps"), _steps(values, "save_steps")
    if evaluates != "steps" or not every or not saved or every < 0 or saved < 0:
        return
    if (every < 1) != (saved < 1):
        yield name, f"save_steps ({saved:g}) and eval_steps ({every:g}) mix a share and a number"
    elif round(saved * 1_000_000) % round(every * 1_000_000):
        yield name, f"save_steps ({saved:g}) is no multiple of eval_steps ({every:g})"


def _of_numbers(values: Mapping[str, Any]) -> Iterator[Fault]:
    if values["warmup_steps"] < 0:
        yield "warmup_steps", f"{values['warmup_steps']} is less than 0"
    workers = values["dataloader_num_workers"]
    if workers < 0:
        yield "dataloader_num_workers", f"{workers} is less than 0; 0 loads in the rank itself"
    if workers == 0 and values["dataloader_prefetch_factor"] is not None:
        yield "dataloader_prefetch_factor", "only workers prefetch; set dataloader_num_workers"
    every = values["torch_empty_cache_steps"]
    if every is not None and every <= 0:
        yield "torch_empty_cache_steps", f"{every} is no number of steps; give 1 or more"


def _of_reporters(said: Any) -> Iterator[Fault]:
    """Told by transformers only when the Trainer is made."""
    names = [said] if isinstance(said, str) else said or []
    known = reporters()
    for name in names:
        if known and name not in (*known, "all", "none"):
            hint = did_you_mean(str(name), known) or f"; use {', '.join(known)}, all or none"
            yield "report_to", f"{name} is not supported{hint}"


def _steps(values: Mapping[str, Any], argument: str) -> float | None:
    """Evaluation follows logging where it is not said."""
    steps: float | None = values[argument]
    follows = argument == "eval_steps" and not steps
    return _steps(values, "logging_steps") if follows else steps
