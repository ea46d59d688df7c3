"""Hyperparameter search: many trainings of `model_init`, each with other arguments.

The backends (Optuna, Ray Tune, Weights & Biases) are transformers' own and call back into the
trainer; what they call is here.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, HPSearchBackend

from bigtrain.errors import UnsupportedError
from bigtrain.trainer import preparation, theirs
from bigtrain.trainer.saving import TRAINER_STATE_FILE, Saving

logger = logging.getLogger(__name__)


class HyperparameterSearch(Saving):
    """How the trainer searches."""

    hp_search_backend: HPSearchBackend | None
    hp_name: Any
    hp_space: Any
    compute_objective: Any
    objective: Any

    def hyperparameter_search(
        self,
        hp_space: Any = None,
        compute_objective: Any = None,
        n_trials: int = 20,
        direction: Any = "minimize",
        backend: Any = None,
        hp_name: Any = None,
        **kwargs: Any,
    ) -> Any:
        """The best of `n_trials` trainings by Optuna, Ray Tune or Weights & Biases."""
        if self._plan is not None:
            raise UnsupportedError(
                "hyperparameter_search starts many trainings, and `bigtrain launch` plans one; "
                "run the script without it"
            )
        search: Any = theirs.Trainer.hyperparameter_search
        return search(
            self,
            hp_space=hp_space,
            compute_objective=compute_objective,
            n_trials=n_trials,
            direction=direction,
            backend=backend,
            hp_name=hp_name,
            **kwargs,
        )

    def _hp_search_setup(self, trial: Any) -> None:
        """Take a trial's values into the arguments, and a new engine for them."""
        self._trial = trial
        if self.hp_search_backend is None or trial is None:
            return
        by_optuna = self.hp_search_backend == HPSearchBackend.OPTUNA
        chosen = dict(self.hp_space(trial) if by_optuna else trial)
        chosen.pop("wandb", None)
        for name, value in chosen.items():
            self._take_hyperparameter(name, value)
        self._train_batch_size = self.args.train_batch_size
        self._renew_engine()

    def _take_hyperparameter(self, name: str, value: Any) -> None:
        if not hasattr(self.args, name):
            logger.warning(
                "the hyperparameter search sets %s, which is no field of TrainingArguments", name
            )
            return
        before = getattr(self.args, name)
        setattr(self.args, name, value if before is None else type(before)(value))

    def _renew_engine(self) -> None:
        """Leave the last trial's model behind; the new arguments decide about the engine."""
        self.engine.close()
        self._engine_config = self._choose_engine(None)
        self._use_engine(self._build_engine())

    def _get_output_dir(self, trial: Any = None) -> str:
        if self.hp_search_backend is None or trial is None:
            return str(self.args.output_dir)
        name = self.hp_name(trial) if self.hp_name is not None else f"run-{self._trial_id(trial)}"
        return str(self._output_dir() / name)

    def _trial_id(self, trial: Any) -> Any:
        if self.hp_search_backend == HPSearchBackend.RAY:
            import ray.tune

            return ray.tune.get_context().get_trial_id()
        if self.hp_search_backend == HPSearchBackend.WANDB:
            import wandb

            return wandb.run.id
        return trial.number

    def _report_to_hp_search(self, trial: Any, step: int, metrics: dict[str, float]) -> None:
        """Tell the backend how a trial does; it may end it."""
        if self.hp_search_backend is None or trial is None:
            return
        report: Any = theirs.Trainer._report_to_hp_search
        report(self, trial, step, metrics)

    def _tune_save_checkpoint(self, checkpoint_dir: str) -> None:
        """What Ray Tune keeps of a trial."""
        directory = Path(checkpoint_dir) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        self.save_model(str(directory), _internal_call=True)
        if not self.args.should_save:
            return
        self._remember_callbacks()
        self.state.save_to_json(str(directory / TRAINER_STATE_FILE))
        if self.optimizer is not None:
            torch.save(self.optimizer.state_dict(), directory / "optimizer.pt")
        torch.save(self.lr_scheduler.state_dict(), directory / "scheduler.pt")

    def _start_over(self, trial: Any) -> None:
        """A fresh model from `model_init`, and with it a fresh engine, optimizer and schedule."""
        preparation.seed(self.args)
        if self._is_prepared:
            self.engine.close()
            self._use_engine(self._build_engine())
        self._adopt_model(self.call_model_init(trial))
        self.optimizer, self.lr_scheduler = None, None
