"""A run file's values that contradict each other or can't be: what its ranks would refuse when they
make the arguments, the optimizer and the schedule, told before anything is queued.

The rules are those of `TrainingArguments._validate_args` in transformers' training_args.py, of
torch's optimizers, and of the functions that transformers makes schedules by.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from bigtrain.arguments import installed
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
_WITHOUT_KEYWORDS = ("constant", "constant_with_warmup")
"""Schedules for which transformers passes over `lr_scheduler_kwargs`."""
_ADAMW = ("adamw_torch", "adamw_torch_fused")
_OF_TORCH = (*_ADAMW, "sgd", "adagrad", "rmsprop")
_MOST_SEED = 2**32 - 1


def faults(values: Mapping[str, Any]) -> Iterator[Fault]:
    """All of them. `values` are those of every argument."""
    yield from _of_cadences(values)
    yield from _of_best_model(values)
    yield from _of_numbers(values)
    yield from _of_optimizer(values)
    yield from _of_debug(values["debug"])
    yield from _of_schedule(values)
    yield from _of_reporters(values["report_to"])


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
    if not 0 <= values["warmup_ratio"] <= 1:
        yield "warmup_ratio", f"{values['warmup_ratio']:g} is no share of all steps; give 0 to 1"
    if not 0 <= values["seed"] <= _MOST_SEED:
        yield "seed", f"{values['seed']} is not between 0 and {_MOST_SEED}"
    noise = values["neftune_noise_alpha"]
    if noise is not None and noise < 0:
        yield "neftune_noise_alpha", f"{noise:g} is less than 0"
    workers = values["dataloader_num_workers"]
    if workers < 0:
        yield "dataloader_num_workers", f"{workers} is less than 0; 0 loads in the rank itself"
    if workers == 0 and values["dataloader_prefetch_factor"] is not None:
        yield "dataloader_prefetch_factor", "only workers prefetch; set dataloader_num_workers"
    every = values["torch_empty_cache_steps"]
    if every is not None and every <= 0:
        yield "torch_empty_cache_steps", f"{every} is no number of steps; give 1 or more"


def _of_optimizer(values: Mapping[str, Any]) -> Iterator[Fault]:
    """What torch's own optimizers refuse; of others nobody knows."""
    kind, rate, epsilon = values["optim"], values["learning_rate"], values["adam_epsilon"]
    if kind in _OF_TORCH and rate < 0:
        yield "learning_rate", f"{rate:g} is less than 0"
    if kind not in _ADAMW:
        return
    for name in ("adam_beta1", "adam_beta2"):
        if not 0 <= values[name] < 1:
            yield name, f"{values[name]:g} is not at least 0 and below 1"
    if epsilon < 0:
        yield "adam_epsilon", f"{epsilon:g} is less than 0"


def _of_debug(said: Any) -> Iterator[Fault]:
    words = said.split() if isinstance(said, str) else said or []
    known = installed.debug_options()
    for word in words:
        if word not in known:
            hint = did_you_mean(str(word), known) or f"; use {' or '.join(known)}"
            yield "debug", f"{word} is not supported{hint}"


def _of_schedule(values: Mapping[str, Any]) -> Iterator[Fault]:
    kind, said = values["lr_scheduler_type"], values["lr_scheduler_kwargs"]
    if kind in _NEED_AN_EVALUATION and values["eval_strategy"] == "no":
        yield "lr_scheduler_type", f"{kind!r} follows evaluations; set eval_strategy"
    if not isinstance(said, Mapping) or kind in _WITHOUT_KEYWORDS:
        return
    known = installed.schedule_keywords(kind)
    for key in said if known is not None else ():
        if key not in (known or ()):
            hint = did_you_mean(key, known or ()) or f"; it takes {', '.join(sorted(known or ()))}"
            yield "lr_scheduler_kwargs", f"{key}: the schedule {kind} has no such keyword{hint}"


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
