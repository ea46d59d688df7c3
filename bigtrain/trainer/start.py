"""From what is asked for to the first step: state, length, engine, scheduler, what was saved."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader
from transformers.trainer_utils import SaveStrategy

from bigtrain.trainer import preparation
from bigtrain.trainer.optimization import Optimization
from bigtrain.trainer.resume import Resume
from bigtrain.trainer.schedule import Schedule

logger = logging.getLogger(__name__)


class Start(Optimization, Resume):
    """What stands ready before the first step."""

    def _start_state(self, asked: Schedule, checkpoint: Path | None, trial: Any) -> Schedule:
        """The trainer's own state, and how long the training is from there."""
        self.state = self._new_state()
        self.state.is_hyper_param_search = trial is not None
        self.state.train_batch_size = self._train_batch_size
        self._load_state(checkpoint)
        self._global_batch_size = asked.global_batch_size
        self._is_sized = asked.is_sized
        self._take_position(checkpoint)
        schedule = self._from_here(asked)
        # The arguments of now count; what was saved is only compared with them.
        self.state.compute_steps(self.args, schedule.max_steps)
        self.state.init_training_references(self, schedule.max_steps, schedule.num_epochs, trial)
        self.current_flos = 0.0
        self._saved_step = None
        self._ends_within_window = False
        return schedule

    def _from_here(self, asked: Schedule) -> Schedule:
        """How long the training is, gone on from where it is."""
        if self._position is None:
            return asked
        step = self.state.global_step
        schedule = asked.after(step, self._position, by_steps=self.args.max_steps > 0)
        if schedule.max_steps != asked.max_steps:
            logger.info(
                "step %d was reached by batches of another size: what is left to see of the data "
                "ends at step %d (with batches of %d throughout it would have been %d)",
                step,
                schedule.max_steps,
                asked.global_batch_size,
                asked.max_steps,
            )
        return schedule

    def _prepare_training(
        self, asked: Schedule, loader: DataLoader[Any], checkpoint: Path | None, trial: Any
    ) -> tuple[Path | None, Schedule]:
        """The trainer's state, model and optimizer into the engine, the schedule on top, then what
        was saved. The checkpoint that it was, and how long the training is from there."""
        schedule = self._start_state(asked, checkpoint, trial)
        preparation.prepare_engine(self, checkpoint)
        self._renew_scheduler(schedule)

        def start_over(older: Path) -> None:
            nonlocal schedule
            schedule = self._start_state(asked, older, trial)
            self._renew_scheduler(schedule)

        if checkpoint is not None:
            checkpoint = self._load_newest(checkpoint, start_over=start_over)
        if self.args.save_strategy != SaveStrategy.NO:
            self._open_saver().warm_up(self.engine)
        for name in ("model", "optimizer", "lr_scheduler"):
            setattr(self.callback_handler, name, getattr(self, name))
        self.callback_handler.train_dataloader = loader
        return checkpoint, schedule

    def _renew_scheduler(self, schedule: Schedule) -> None:
        """A scheduler for this training, unless the user gave one."""
        if self._created_lr_scheduler:
            self.lr_scheduler, self._created_lr_scheduler = None, False
        self.create_scheduler(num_training_steps=schedule.max_steps)
