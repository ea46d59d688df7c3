"""Checkpoints that training goes on from: when they are saved, and what becomes of older ones."""

from __future__ import annotations

import copy
import logging
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn
from transformers import TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from bigtrain.checkpoint.manifest import Progress
from bigtrain.checkpoint.save import InFlight, Saver, SaveRequest
from bigtrain.checkpoint.staging import kept_at_most, rotate
from bigtrain.errors import CheckpointError, UnsupportedError
from bigtrain.trainer import collectives, rng
from bigtrain.trainer.callback_states import CallbackStates
from bigtrain.trainer.exporting import Exports
from bigtrain.trainer.leasing import Leasing
from bigtrain.trainer.models import Models

logger = logging.getLogger(__name__)

TRAINER_STATE_FILE = "trainer_state.json"


class Saving(Models, CallbackStates, Leasing):
    """The trainer's saves."""

    _run_id: str | None = None
    _samples_seen = 0
    _samples_in_epoch = 0
    _global_batch_size = 0
    _saver: Saver | None = None
    _exports: Exports | None = None
    _saved_step: int | None = None
    _state_of_save: TrainerState | None = None
    """The state as it was at the save in flight: `on_save` comes later, and is told of then."""

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Commit `checkpoint-<step>`; older ones go only after that. All ranks call it.

        In the background, the commit comes when training has gone on: see `_settle_save`.
        """
        self._finish_save()
        self.store_flos()
        output_dir = Path(self._get_output_dir(trial)).absolute()
        target = output_dir / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        self._remember_best(output_dir, target)
        self._remember_callbacks()
        request = SaveRequest(
            target=target,
            run_id=self._run(),
            progress=self._progress(),
            scheduler_state=self.lr_scheduler.state_dict(),
            rng_state=rng.state(self.engine.device),
            write_files=self._write_checkpoint_files,
            only_model=self.args.save_only_model,
            check_place=self._may_write,
        )
        with self._failure_as_asked():
            saver = self._open_saver()
            saver.save(request, self.engine, wait=not self._may_save_later())
            self._saved_step = self.state.global_step
            if saver.in_flight is None:
                self._tell_saved(InFlight(target=target, progress=request.progress))

    def _save_and_tell(self, model: nn.Module, trial: Any) -> None:
        """Save, and fire `on_save` once the checkpoint is committed: now, or at a later step."""
        self._save_checkpoint(model, trial)
        if self._saver is not None and self._saver.in_flight is not None:
            self._state_of_save = copy.copy(self.state)
            self._stop.forget_save()
        elif self._saved_step == self.state.global_step or self._overrides_saving():
            self._fire("on_save")
        self.control.should_save = False

    def _settle_save(self) -> None:
        """Between two steps: finish the save in flight once all ranks know that it is done."""
        if self._saver is None or self._saver.in_flight is None:
            return
        if self._saver.is_settled(self._stop.save_status()):
            self._finish_save()
        else:
            self._stop.note_save(self._saver.status())

    def _finish_save(self) -> None:
        """Wait for the save in flight, and fire its `on_save`. All ranks call it."""
        if self._saver is None or self._saver.in_flight is None:
            return
        with self._failure_as_asked():
            finished = self._saver.finish()
            if finished is not None:
                self._tell_saved(finished)
                self._fire_on_save_of(self._state_of_save or self.state)

    def _fire_on_save_of(self, state: TrainerState) -> None:
        """`on_save` as it would have come at that step: callbacks look for its checkpoint."""
        self.control = self.callback_handler.on_save(self.args, state, self.control)

    def _tell_saved(self, saved: InFlight) -> None:
        self._reporter.saved(saved.target, saved.progress.step)
        if self._exports is None:
            self._exports = Exports.asked(self.args, is_sharded=self.engine.is_sharded)
        self._exports.add(saved.target)
        self._rotate(saved.target.parent, newest=saved.target)

    def _open_saver(self) -> Saver:
        if self._saver is None:
            self._saver = Saver(
                self.args.ranks,
                in_background=self._saves_in_background(),
                on_each_node=self._saves_on_each_node(),
            )
        return self._saver

    def _close_saver(self, *, is_done: bool) -> None:
        """Let the writing process go; it finishes what it was told. Exports end with the training
        unless it `is_done`."""
        if self._saver is not None:
            self._saver.close()
        if self._exports is not None:
            self._exports.close(wait=is_done)
        self._saver = self._exports = None

    def _saves_in_background(self) -> bool:
        # A script without the launcher is used to events in transformers' order.
        asked = self.args.async_save
        return self._plan is not None if asked is None else bool(asked)

    def _saves_on_each_node(self) -> bool:
        nodes = self.args.world_size // max(1, self.args.ranks.local_world_size)
        return bool(self.args.save_on_each_node) and nodes > 1

    def _may_save_later(self) -> bool:
        """Not where an override or callback takes the files to be there when it has saved."""
        if not self._saves_in_background() or not self.is_in_train:
            return False
        reason = None
        if self._overrides_saving():
            reason = f"{type(self).__name__} overrides _save_checkpoint"
        elif self.args.enable_jit_checkpoint:
            reason = "enable_jit_checkpoint is on"
        if reason is not None and not self._has_said_why:
            logger.info("saving while training waits: %s", reason)
            self._has_said_why = True
        return reason is None

    _has_said_why = False

    def _overrides_saving(self) -> bool:
        return type(self)._save_checkpoint is not Saving._save_checkpoint

    @contextmanager
    def _failure_as_asked(self) -> Iterator[None]:
        """`on_save_failure: continue` makes a failed save a warning. It failed on all ranks."""
        try:
            yield
        except CheckpointError as fault:
            if self.args.on_save_failure != "continue":
                raise
            self._saved_step = None
            logger.warning("no checkpoint was saved, going on without it: %s", fault)

    def _write_checkpoint_files(self, directory: Path) -> None:
        """The files that the checkpoint itself does not make; on rank 0, without collectives."""
        if self.engine.is_sharded:
            self._save_config(directory)
            self._save_companions(directory)
        else:
            self.save_model(str(directory), _internal_call=True)
        self.state.save_to_json(str(directory / TRAINER_STATE_FILE))

    def _progress(self) -> Progress:
        return Progress(
            step=self.state.global_step,
            epoch=self.state.epoch or 0.0,
            samples_seen=self._samples_seen,
            samples_in_epoch=self._samples_in_epoch,
            global_batch_size=self._global_batch_size,
            tokens_seen=self.state.num_input_tokens_seen,
            seed=self.args.seed,
        )

    def _run(self) -> str:
        """The id that this run's checkpoints bear: that of the one which it goes on from, else
        the plan's."""
        if self._run_id is None:
            planned = self._plan.run_id if self._plan is not None else ""
            self._run_id = collectives.from_main(planned or uuid.uuid4().hex)
        return self._run_id

    def _remember_best(self, output_dir: Path, target: Path) -> None:
        if not self.state.best_global_step:
            return
        best = output_dir / f"{PREFIX_CHECKPOINT_DIR}-{self.state.best_global_step}"
        if best == target or best.exists():
            relative = Path(self._get_output_dir()) / best.name
            self.state.best_model_checkpoint = str(relative)

    def _rotate(self, output_dir: Path, *, newest: Path) -> None:
        if not self.args.should_save:
            return
        protect = {newest}
        if self.state.best_model_checkpoint is not None:
            protect.add(Path(self.state.best_model_checkpoint).absolute())
        if self._exports is not None:
            protect |= self._exports.in_use
        protect |= self._in_upload()
        keep = kept_at_most(self.args.save_total_limit, protected=len(protect))
        if keep is None:
            return
        try:
            rotate(output_dir, run_id=self._run(), keep=keep, protect=protect)
        except OSError as error:
            logger.warning("older checkpoints in %s could not be removed: %s", output_dir, error)

    def _in_upload(self) -> set[Path]:
        """Checkpoints that something still reads."""
        return set()

    def _keep_only_best(self) -> None:
        """As in transformers: at the end, a limit of one leaves the best alone."""
        best = self.state.best_model_checkpoint
        if self.args.save_total_limit != 1 or best is None or not self.args.should_save:
            return
        protect = {Path(best).absolute()}
        rotate(
            Path(best).absolute().parent,
            run_id=self._run(),
            keep=1,
            protect=protect,
            spare_newest=False,
        )

    def _check_saving(self) -> None:
        """Refuse at construction what would fail at the first save."""
        args = self.args
        if self._saves_on_each_node() and args.export == "every" and self.engine.is_sharded:
            raise UnsupportedError(
                "export: every is not supported with save_on_each_node, where no node has all of "
                "a checkpoint; use export: last"
            )
        if args.save_only_model and args.load_best_model_at_end and self.engine.is_sharded:
            raise ValueError(
                f"save_only_model can't be used with load_best_model_at_end on engine "
                f"{self.engine.name}"
            )

    def _require_resumable(self, path: Path, has_optimizer: bool) -> None:
        if not has_optimizer:
            raise CheckpointError(
                f"{path} holds a model only (it was saved with save_only_model), so training "
                "can't go on from it; give a checkpoint with an optimizer, or load it as the model"
            )
