"""Hyperparameter search: trials of `model_init`, by transformers' backends."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import optuna
import pytest
import transformers
from transformers import LlamaForCausalLM
from transformers.hyperparameter_search import OptunaBackend

from bigtrain.trainer.arguments import TrainingArguments
from bigtrain.trainer.trainer import Trainer
from tests.trainer.samples import Points, Regression, Sentences, arguments, tiny_llama

OURS = (Trainer, TrainingArguments)


def searcher(folder: Path, **changed: Any) -> Trainer:
    fields = {"eval_strategy": "epoch", "save_strategy": "epoch", **changed}
    return Trainer(
        args=arguments(folder, **fields),
        train_dataset=Points(16),
        eval_dataset=Points(8),
        model_init=Regression,
    )


def rates(trial: Any) -> dict[str, Any]:
    return {"learning_rate": trial.suggest_categorical("learning_rate", [1e-9, 0.1])}


def test_the_trial_that_learns_wins_and_each_has_a_directory_of_its_own(tmp_path: Path) -> None:
    run = searcher(tmp_path)
    space = {"learning_rate": [1e-9, 0.1]}
    best = run.hyperparameter_search(
        hp_space=rates,
        n_trials=2,
        hp_name=lambda trial: f"trial-{trial.number}",
        sampler=optuna.samplers.GridSampler(space),
    )
    assert best.hyperparameters == {"learning_rate": 0.1}
    assert run.args.learning_rate in space["learning_rate"]
    made = [(tmp_path / f"trial-{number}" / "checkpoint-8").is_dir() for number in (0, 1)]
    assert made == [True, True] and not list(tmp_path.glob("checkpoint-*"))


def test_a_trial_that_does_badly_is_pruned(tmp_path: Path) -> None:
    run = searcher(tmp_path, num_train_epochs=3)
    with pytest.raises(ValueError, match="No trials are completed yet"):
        run.hyperparameter_search(
            hp_space=rates, n_trials=1, pruner=optuna.pruners.ThresholdPruner(upper=1e-6)
        )


def test_a_backend_that_is_missing_is_named_with_how_to_install_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(OptunaBackend, "is_available", staticmethod(lambda: False))
    with pytest.raises(RuntimeError, match=r"optuna.*pip install optuna"):
        searcher(tmp_path).hyperparameter_search(backend="optuna", hp_space=rates)


def test_a_search_needs_a_model_init(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(OptunaBackend, "is_available", staticmethod(lambda: True))
    run = Trainer(model=Regression(), args=arguments(tmp_path), train_dataset=Points(4))
    with pytest.raises(RuntimeError, match="model_init"):
        run.hyperparameter_search(backend="optuna", hp_space=rates)


def test_a_search_over_the_seed_and_the_model_gives_transformers_numbers(tmp_path: Path) -> None:
    def space(trial: Any) -> dict[str, Any]:
        return {
            "seed": trial.suggest_categorical("seed", [3, 5]),
            "per_device_train_batch_size": trial.suggest_categorical("size", [2, 4]),
        }

    def model_init(trial: Any) -> LlamaForCausalLM:
        # Drawn before the space is: the sampler's numbers come in this order.
        layers = 1 if trial is None else trial.suggest_int("layers", 1, 3)
        return LlamaForCausalLM(tiny_llama(num_hidden_layers=layers).config)

    found = []
    for kind, fields in ((transformers.Trainer, transformers.TrainingArguments), OURS):
        run = kind(
            args=arguments(tmp_path, kind=fields, eval_strategy="epoch", num_train_epochs=1),
            train_dataset=Sentences(22),
            eval_dataset=Sentences(9),
            model_init=model_init,
        )
        sampler = optuna.samplers.RandomSampler(seed=1)
        best = run.hyperparameter_search(hp_space=space, n_trials=4, sampler=sampler)
        found.append((best.objective, best.hyperparameters))
    assert found[0] == found[1]
