"""The one training loop: train → epoch → window → micro-batch.

It knows the engine's protocol and no engine by name. In a step it waits for nothing of the
device: losses add up there and are read at logging steps; what all ranks must know together (the
items of a window, whether to stop) takes one small all-reduce a window.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader
from transformers.trainer_utils import (
    SaveStrategy,
    TrainOutput,
    find_executable_batch_size,
    speed_metrics,
)

from bigtrain.errors import CheckpointError
from bigtrain.trainer import preparation, sharding
from bigtrain.trainer.core import their_logger
from bigtrain.trainer.evaluation import Evaluation
from bigtrain.trainer.hub import Hub
from bigtrain.trainer.hyperparameters import HyperparameterSearch
from bigtrain.trainer.schedule import Schedule
from bigtrain.trainer.start import Start
from bigtrain.trainer.stopping import StopRequestedError

logger = logging.getLogger(__name__)


class Loop(Evaluation, Start, HyperparameterSearch, Hub):
    """How the trainer trains."""

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """Train, from the start or from a checkpoint. All ranks call it.

        `resume_from_checkpoint`: a checkpoint's path, or True for the newest in `output_dir`.
        Ends by SystemExit where the cluster asked to stop, with a checkpoint saved.
        """
        self._memory_tracker.start()
        if self.args.save_strategy == SaveStrategy.NO and not self._stop.is_armed:
            return self._train(resume_from_checkpoint, trial, ignore_keys_for_eval)
        with self._holding(self._output_dir(), self._plan, self.args.ranks):
            return self._train(resume_from_checkpoint, trial, ignore_keys_for_eval)

    def _train(
        self,
        resume_from_checkpoint: str | bool | None,
        trial: Any,
        ignore_keys_for_eval: list[str] | None,
    ) -> TrainOutput:
        checkpoint = self._checkpoint_to_resume(resume_from_checkpoint)
        if self.model_init is not None:
            self._start_over(trial)
        # Behind `model_init`, which may draw from the trial, and before a trial's seed counts.
        self._hp_search_setup(trial)
        if checkpoint is not None and self.args.auto_find_batch_size:
            self._take_found_batch_size(checkpoint)
        preparation.prepare_model(self)
        run = find_executable_batch_size(
            self._train_at_batch_size, self._train_batch_size, self.args.auto_find_batch_size
        )
        self.is_in_train, is_done = True, False
        with self._stop.listening():
            try:
                output: TrainOutput = run(
                    checkpoint=checkpoint, trial=trial, ignore_keys_for_eval=ignore_keys_for_eval
                )
                is_done = True
            except StopRequestedError as stop:
                self._leave(stop, trial)
            finally:
                self._close_saver(is_done=is_done)
                preparation.restore_model(self)
                self._has_trained = True
                self.is_in_train = False
        return output

    def _train_at_batch_size(
        self,
        batch_size: int,
        checkpoint: Path | None,
        trial: Any,
        ignore_keys_for_eval: list[str] | None,
    ) -> TrainOutput:
        self._train_batch_size = batch_size
        loader = self.get_train_dataloader()
        asked = Schedule.of(self.set_initial_training_values(self.args, loader))
        checkpoint, schedule = self._prepare_training(asked, loader, checkpoint, trial)
        self._tell_what_runs(schedule)
        start_time = time.time()
        self._initial_num_input_tokens_seen = self.state.num_input_tokens_seen
        self._initial_global_step = self.state.global_step
        self._reset_losses()
        self._reporter.start(step=self.state.global_step)
        self.engine.zero_grad()
        self._fire("on_train_begin")
        if self.args.eval_on_start:
            with self._reporter.pausing():
                metrics = self._evaluate(trial, ignore_keys_for_eval, skip_scheduler=True)
            if self.args.metric_for_best_model is not None:
                self._watched_metric(metrics)  # one that does not exist is said before training
        after_step = self._cadence(trial, ignore_keys_for_eval, start_time)
        for epoch in self._epochs_to_do(schedule, checkpoint):
            self._train_epoch(epoch, loader, schedule, checkpoint, after_step)
            checkpoint = None
            if self.control.should_training_stop:
                break
        return self._finalize_training(trial, schedule.num_train_samples, start_time)

    def _epochs_to_do(self, schedule: Schedule, checkpoint: Path | None) -> range:
        if checkpoint is not None and self.state.global_step >= schedule.max_steps:
            logger.info("step %d of %d is done", self.state.global_step, schedule.max_steps)
            return range(0)
        first = self.state.global_step // schedule.steps_per_epoch
        if self._position is not None:
            first = self._position.epoch
        return range(first, schedule.num_epochs)

    # ---- An epoch ----

    def _train_epoch(
        self,
        epoch: int,
        loader: DataLoader[Any],
        schedule: Schedule,
        resumed_from: Path | None,
        after_step: Callable[..., None],
    ) -> None:
        self._fire("on_epoch_begin")
        windows_done = self._windows_done(schedule, resumed_from)
        self._samples_in_epoch = windows_done * schedule.global_batch_size
        if windows_done:
            done = windows_done * self.args.gradient_accumulation_steps
            loader = sharding.skip_batches(loader, done)
        elif resumed_from is not None:
            self._load_rng_state(resumed_from)
            resumed_from = None
        sharding.set_epoch(loader, epoch)
        batches = iter(loader)
        last_of_epoch = schedule.steps_per_epoch - 1
        has_batches = windows_done > 0
        grad_norm, learning_rate = None, None
        for window in range(windows_done, schedule.steps_per_epoch):
            self._stop.check()
            self._settle_save()
            size = self._window_size(schedule, is_last=window == last_of_epoch)
            micro_batches, num_items = self.get_batch_samples(batches, size, self.args.device)
            self._pass_stop_flag()
            if resumed_from is not None:
                # Reading the data drew from the generators; the training goes on where it was.
                self._load_rng_state(resumed_from)
                resumed_from = None
            if not micro_batches:
                break
            has_batches = True
            done = window * self.args.gradient_accumulation_steps + len(micro_batches)
            progress = epoch + done / schedule.batches_per_epoch
            grad_norm, learning_rate = self._run_window(micro_batches, num_items, progress)
            if not self._ends_within_window:
                after_step(epoch, grad_norm, learning_rate)
            if self.control.should_epoch_stop or self.control.should_training_stop:
                break
        if not has_batches:
            self._tell_that_data_is_empty()
        self._fire("on_epoch_end")
        after_step(epoch, grad_norm, learning_rate)

    def _window_size(self, schedule: Schedule, *, is_last: bool) -> int:
        """Micro-batches in a window; an epoch's last one has what is left."""
        accumulation: int = self.args.gradient_accumulation_steps
        left = schedule.batches_per_epoch % accumulation
        return left if is_last and left else accumulation

    def _windows_done(self, schedule: Schedule, resumed_from: Path | None) -> int:
        if resumed_from is None or self.args.ignore_data_skip:
            return 0
        if self._position is not None:
            return self._position.windows
        return int(self.state.global_step % schedule.steps_per_epoch)

    def _pass_stop_flag(self) -> None:
        is_saving = self._saver is not None and self._saver.in_flight is not None
        if (self._stop.is_armed or is_saving) and not self._has_exchanged:
            self._stop.exchange(None)
        self._has_exchanged = False

    # ---- A window: one optimizer step ----

    def _run_window(
        self, micro_batches: list[Any], num_items: Tensor | int | None, epoch_progress: float
    ) -> tuple[Tensor | None, float | None]:
        """Accumulate, step, schedule. The gradient norm (on the device) and the learning rate."""
        self.current_gradient_accumulation_steps = len(micro_batches)
        self._ends_within_window = False
        for index, inputs in enumerate(micro_batches):
            is_last = index == len(micro_batches) - 1
            if index == 0:
                self._fire("on_step_begin")
            self._run_micro_batch(inputs, num_items, is_last=is_last)
            if not is_last:
                self._fire("on_substep_end")
                if self.control.should_epoch_stop or self.control.should_training_stop:
                    self._ends_within_window = True
                    return None, None
        result = self.engine.step(self._norm_limit(), before_update=self._before_update)
        self.accelerator.optimizer_step_was_skipped = result.skipped
        self._fire("on_optimizer_step")
        learning_rate = self._get_learning_rate()
        if not result.skipped and not self._follows_metric():
            self.lr_scheduler.step()
        self.engine.zero_grad()
        self.state.global_step += 1
        self.state.epoch = epoch_progress
        self._samples_seen += self._global_batch_size
        self._samples_in_epoch += self._global_batch_size
        self._fire("on_step_end")
        return result.grad_norm, learning_rate

    def _run_micro_batch(
        self, inputs: Any, num_items: Tensor | int | None, *, is_last: bool
    ) -> None:
        self.accelerator.gradient_state._set_sync_gradients(is_last)
        with self.engine.accumulating(last=is_last or self.accelerator.syncs_each_batch):
            loss = self.training_step(self.model_wrapped, inputs, num_items)
        self._add_loss_of_step(loss)
        self._count_work(inputs)
        self._track_num_input_tokens(inputs)

    def _before_update(self) -> None:
        self._fire("on_pre_optimizer_step")

    # ---- Cadence: log, evaluate, save ----

    def _cadence(
        self, trial: Any, ignore_keys_for_eval: list[str] | None, start_time: float
    ) -> Callable[..., None]:
        def after_step(epoch: int, grad_norm: Any, learning_rate: float | None) -> None:
            self._maybe_log_save_evaluate(
                self._tr_loss,
                grad_norm,
                self.model_wrapped,
                trial,
                epoch,
                ignore_keys_for_eval,
                start_time,
                learning_rate=learning_rate,
            )

        return after_step

    def _maybe_log_save_evaluate(
        self,
        tr_loss: Tensor,
        grad_norm: Tensor | float | None,
        model: nn.Module,
        trial: Any,
        epoch: float,
        ignore_keys_for_eval: list[str] | None,
        start_time: float,
        learning_rate: float | None = None,
    ) -> None:
        """Do what the callbacks asked for after a step: log, evaluate, save."""
        if self.control.should_log and self.state.global_step > self._globalstep_last_logged:
            rate = self._get_learning_rate() if learning_rate is None else learning_rate
            self._log_losses(grad_norm, rate, start_time)
        if self.control.should_evaluate:
            with self._reporter.pausing():
                metrics = self._evaluate(trial, ignore_keys_for_eval)
            is_best = self._determine_best_metric(metrics=metrics, trial=trial)
            if self.args.save_strategy == SaveStrategy.BEST:
                self.control.should_save = is_best
        if self.control.should_save:
            with self._reporter.pausing():
                self._save_and_tell(model, trial)

    # ---- The end ----

    def _prepare_trained(self) -> tuple[nn.Module, Optimizer | None]:
        preparation.prepare_engine(self, None)
        return self.model_wrapped, self.optimizer

    def _finalize_training(
        self, trial: Any, num_train_samples: float, start_time: float
    ) -> TrainOutput:
        # By this name the memory tracker knows which stage of a training it measures.
        self._total_loss_scalar += self._tr_loss.item()
        steps = self.state.global_step - self._initial_global_step
        train_loss = self._total_loss_scalar / max(steps, 0.001)
        metrics = speed_metrics(
            "train",
            start_time,
            num_samples=num_train_samples * steps / max(self.state.max_steps, 1),
            num_steps=steps,
        )
        self.store_flos()
        metrics["total_flos"] = self.state.total_flos
        metrics["train_loss"] = train_loss
        self._memory_tracker.stop_and_update_metrics(metrics)
        self.log(metrics)
        self._finish_last_save(trial=None)
        if self.args.load_best_model_at_end and self.state.best_model_checkpoint is not None:
            self._load_best_model()
        self._keep_only_best()
        self._finish_current_push()
        self._fire("on_train_end")
        return TrainOutput(self.state.global_step, train_loss, metrics)

    def _leave(self, stop: StopRequestedError, trial: Any) -> NoReturn:
        """Save what is there, together with all ranks, and end this process."""
        self._reporter.say(f"stopping at step {self.state.global_step}: saving a checkpoint first")
        self._finish_last_save(trial)
        if self.state.global_step > 0 and self._saved_step != self.state.global_step:
            self._save_and_tell(self.model_wrapped, trial)
            self._finish_save()
        raise SystemExit(stop.exit_code)

    def _finish_last_save(self, trial: Any) -> None:
        """Finish the save in flight. Where it failed, what there is now is saved in its place,
        while there is anything; if that fails as well, it is an error."""
        try:
            self._finish_save()
        except CheckpointError as fault:
            logger.warning("the last save failed, saving once more: %s", fault)
            self._save_and_tell(self.model_wrapped, trial)
            self._finish_save()

    def _tell_what_runs(self, schedule: Schedule) -> None:
        their_logger.info("***** Running training *****")
        their_logger.info("  Num examples = %s", f"{schedule.num_examples:,}")
        their_logger.info("  Total optimization steps = %s", f"{schedule.max_steps:,}")
        logger.info(
            "training %d steps of %d samples on engine %s (%d examples, %d steps an epoch)",
            schedule.max_steps,
            schedule.global_batch_size,
            self.engine.name,
            schedule.num_examples,
            schedule.steps_per_epoch,
        )

    def _tell_that_data_is_empty(self) -> None:
        logger.warning(
            "There seems not to be a single sample in your epoch_iterator, stopping training at "
            "step %d! This is expected if you're using an IterableDataset and set num_steps (%d) "
            "higher than the number of available samples.",
            self.state.global_step,
            self.state.max_steps,
        )
        self.control.should_training_stop = True
