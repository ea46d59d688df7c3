"""Going on from a checkpoint: which one, what of it, and where the data continues.

bigtrain's own checkpoints load into any engine at any size, and so do those with an optimizer's
state that transformers, accelerate, DeepSpeed or torch wrote; `plain_weights` loads the rest.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerState
from transformers.trainer_pt_utils import safe_globals
from transformers.trainer_utils import (
    _is_peft_model,
    compare_trainer_and_checkpoint_args,
    get_last_checkpoint,
)

from bigtrain.checkpoint.agreement import attempt, gather_all, on_main
from bigtrain.checkpoint.find import find_checkpoint, lost_manifest, require_checkpoint
from bigtrain.checkpoint.foreign import is_foreign
from bigtrain.checkpoint.inert import Inert
from bigtrain.checkpoint.load import LoadedCheckpoint, group_names, open_checkpoint, restore
from bigtrain.checkpoint.manifest import read_manifest
from bigtrain.checkpoint.node_agreement import newest_on_all_nodes, require_same
from bigtrain.checkpoint.staging import committed
from bigtrain.checkpoint.torch_file import Archive
from bigtrain.checkpoint.verify import require_trainer_state, require_whole_zip
from bigtrain.errors import CheckpointError
from bigtrain.trainer import differences, environment, rng, schedule
from bigtrain.trainer.candidates import (
    Search,
    is_deepspeed,
    is_ours,
    is_transformers,
    trainer_state,
)
from bigtrain.trainer.models import TRAINING_ARGS_FILE
from bigtrain.trainer.plain_weights import PlainWeights
from bigtrain.trainer.saving import TRAINER_STATE_FILE
from bigtrain.trainer.schedule import Position

logger = logging.getLogger(__name__)


class NoCheckpointError(CheckpointError, ValueError):
    """Nothing to resume from. Also the ValueError that scripts for transformers' Trainer expect."""


class Resume(PlainWeights):
    """What the trainer reads back."""

    _position: Position | None = None
    _is_sized = True  # the training data has a length
    _has_trained = False  # what is in the directory since then is this trainer's own
    _search: Search | None = None
    """How the checkpoint was found, and an older one can be; None where it was named."""

    # ---- Which ----

    def _checkpoint_to_resume(self, asked: str | bool | None) -> Path | None:
        """The checkpoint that `train(resume_from_checkpoint=asked)` means. All ranks call it.

        What the launcher was told counts before what the script says, and after a restart what
        this attempt has committed.
        """
        self._search = None
        planned = self._plan.resume if self._plan is not None else "script"
        if planned == "auto":
            since = environment.begun_anew(self._plan)
            found = self._last_checkpoint(since=since)
            if found is None and since is not None:
                self._say_what_stays("this run was begun anew with --resume never")
            return found
        if environment.is_restarted():
            own = self._last_checkpoint(since=environment.plan_written())
            if own is not None:
                return own
        if planned == "never":
            self._say_what_stays("--resume never begins anew")
            return None
        if planned != "script":
            asked = planned
        if asked is None and self.args.overwrite_output_dir and not self._has_trained:
            return self._last_checkpoint()
        if asked is None or asked is False:
            if self._plan is not None and not self._has_trained:
                self._say_what_stays("this run begins anew (--resume auto would go on)")
            return None
        if asked is True:
            found = self._last_checkpoint()
            if found is None:
                raise NoCheckpointError(
                    f"No valid checkpoint found in output directory ({self.args.output_dir})"
                )
            return found
        path = Path(asked)
        if path.is_dir() and _is_others(path):
            found = path
        else:
            try:
                found = require_checkpoint(path)
            except CheckpointError as error:
                why = f"Can't find a valid checkpoint at {path}: {error}"
                raise NoCheckpointError(why) from error
        logger.info("going on from %s", found)
        return found

    def _say_what_stays(self, why: str) -> None:
        """Beginning anew beside earlier checkpoints, which are not lost at once."""
        there = committed(self._output_dir()) if self.is_world_process_zero() else []
        if there:
            logger.warning(
                "%s holds %d checkpoints of an earlier run (to step %d): %s; each stays until "
                "this run saves the same step, whatever save_total_limit says",
                self._output_dir(),
                len(there),
                there[0][0],
                why,
            )

    def _last_checkpoint(self, *, since: datetime | None = None) -> Path | None:
        """The newest that verifies, committed after `since`; decided by rank 0 for all."""
        self._search = Search(since=since)
        path = self._next_checkpoint(self._search)
        if path is not None:
            logger.info("going on from %s", path)
        return path

    def _next_checkpoint(self, search: Search) -> Path | None:
        """Of those left by `search` the newest whose trainer's state can be gone on from."""
        path = self._newest(search)
        if path is None:
            return None
        try:
            attempt(self.args.ranks, lambda: _saved_state(path))
        except CheckpointError as fault:
            older = self._next_checkpoint(search.without(path))
            if older is None:
                raise
            if self.is_world_process_zero():
                logger.warning("%s is passed over: %s", path, fault)
            return older
        return path

    def _newest(self, search: Search) -> Path | None:
        if self._saves_on_each_node():
            where = self.args.ranks, self._output_dir()
            return newest_on_all_nodes(*where, since=search.since, excluding=search.damaged)
        return on_main(self.args.ranks, lambda: self._find_last(search))

    def _find_last(self, search: Search) -> Path | None:
        directory = self._output_dir()
        if not directory.is_dir():
            return None
        found = find_checkpoint(
            directory, since=search.since, excluding=search.damaged, resumable=True
        )
        chosen = found.path
        if chosen is None and search.since is None:
            chosen = self._find_last_of_others(search)
            if chosen is not None:
                _say_that_nothing_is_verified(chosen)
        for path, why in found.passed_over:
            if path == chosen:
                break  # transformers' own, which has no manifest; those that follow are older
            logger.warning("%s is passed over: %s", path, why)
        if chosen is None and found.passed_over and search.since is None:
            logger.warning("no checkpoint in %s is whole: training starts anew", directory)
        return chosen

    def _find_last_of_others(self, search: Search) -> Path | None:
        """transformers' newest, as it finds it."""
        last = get_last_checkpoint(str(self._output_dir()))
        if last is None or Path(last) in search.damaged or not _is_others(Path(last)):
            return None
        return Path(last)

    # ---- What ----

    def _load_state(self, checkpoint: Path | None) -> None:
        """The trainer's own state, from the checkpoint where it has one."""
        state = None if checkpoint is None else _saved_state(checkpoint)
        if checkpoint is None or state is None:
            return
        self.state = state
        best = self.state.best_model_checkpoint
        if best is not None and not Path(best).is_dir():
            logger.warning("the best checkpoint %s is gone; going on without it", best)
            self.state.best_model_checkpoint = None
        if self.state.train_batch_size is not None:
            compare_trainer_and_checkpoint_args(self.args, self.state)
        if self.is_world_process_zero():
            differences.tell(checkpoint / TRAINING_ARGS_FILE, self.args)
        self._load_callback_state()

    def _take_found_batch_size(self, checkpoint: Path) -> None:
        """Start at the batch size that `auto_find_batch_size` has found before."""
        state = _saved_state(checkpoint)
        if state is not None and state.train_batch_size is not None:
            self._train_batch_size = state.train_batch_size

    def _load_newest(self, checkpoint: Path, *, start_over: Callable[[Path], None]) -> Path:
        """Load `checkpoint`, or an older one where that turns out to be damaged and any will do;
        `start_over` then takes the trainer's own state from it. The one that was loaded."""
        while True:
            try:
                self._load_training(checkpoint)
                return checkpoint
            except CheckpointError as fault:
                if self._search is None:
                    raise
                self._search = self._search.without(checkpoint)
                older = self._next_checkpoint(self._search)
                if older is None:
                    raise
                logger.warning("%s is passed over: %s", checkpoint, fault)
                logger.info("going on from %s", older)
                checkpoint = older
                start_over(checkpoint)

    def _load_training(self, checkpoint: Path) -> None:
        """Weights, optimizer, scheduler and loss scale into what is prepared. All ranks call it.

        Raises CheckpointError on all ranks or on none.
        """
        if self._loads_before_preparing(checkpoint):
            self._load_foreign_optimizer(checkpoint)
            return
        with self._opened(checkpoint) as loaded:
            resets = self.args.reset_optimizer
            if not resets:
                self._require_resumable(checkpoint, loaded.source.param_groups is not None)
            if checkpoint.resolve().parent == self._output_dir().resolve():
                self._run_id = loaded.run_id
            ranks = self.args.ranks
            restore(self.engine, loaded, world=ranks, optimizer=not resets)
            scheduler, scaler = attempt(
                ranks, lambda: (loaded.scheduler_state(), loaded.scaler_state())
            )
            if scheduler is not None and not is_deepspeed(scheduler):
                self.lr_scheduler.load_state_dict(self._fitted(scheduler, loaded))
            if not resets and scaler:
                self.engine.load_scaler_state(scaler)
        self._restored = checkpoint
        self._load_from_checkpoint(checkpoint)
        self._restored = None

    def _fitted(self, scheduler: dict[str, Any], loaded: LoadedCheckpoint) -> dict[str, Any]:
        return schedule.fitted(
            scheduler,
            self.lr_scheduler.state_dict(),
            saved=[bool(group["params"]) for group in loaded.source.param_groups or ()],
            live=[bool(names) for names in group_names(self.engine)],
        )

    def _opened(self, checkpoint: Path) -> LoadedCheckpoint:
        names = group_names(self.engine)
        loaded = attempt(self.args.ranks, lambda: open_checkpoint(checkpoint, names=names))
        if self._saves_on_each_node():
            require_same(self.args.ranks, loaded)
        return loaded

    def _take_position(self, checkpoint: Path | None) -> None:
        """Where the data goes on, where the steps alone don't tell: not all of them had as many
        samples as those of now, or the data has no length and was read in passes."""
        self._samples_seen, self._position = 0, None
        if checkpoint is None or not is_ours(checkpoint):
            return
        progress = attempt(self.args.ranks, lambda: read_manifest(checkpoint).progress)
        self._samples_seen = progress.samples_seen
        before, now = progress.global_batch_size, self._global_batch_size
        is_even = before == now and progress.samples_seen == progress.step * now
        if before is None or (is_even and self._is_sized):
            return
        self._position = Position.behind(progress, batch_size=now, is_sized=self._is_sized)
        if self._position.repeated and self.is_world_process_zero():
            logger.warning(
                "the checkpoint's %d samples of its epoch are no whole number of batches of %d: "
                "%d of them are seen again",
                progress.samples_in_epoch,
                now,
                self._position.repeated,
            )

    def _load_rng_state(self, checkpoint: str | Path | None) -> None:
        """This rank's random generators as they were when the checkpoint was saved; with another
        number of ranks, new ones that follow from seed, step and rank."""
        if checkpoint is None:
            return
        states, world_size = self._saved_rng(Path(checkpoint))
        if states is not None and world_size == self.args.world_size:
            rng.restore(states, self.engine.device)
            return
        step, rank = self.state.global_step, self.args.process_index
        rng.derive(seed=self.args.seed, step=step, rank=rank, device=self.engine.device)
        if self.is_world_process_zero():
            logger.info(
                "%s was saved by %d ranks, this run has %d: random numbers go on from seed %d, "
                "step and rank",
                checkpoint,
                world_size,
                self.args.world_size,
                self.args.seed,
            )

    def _saved_rng(self, checkpoint: Path) -> tuple[dict[str, Any] | None, int]:
        """This rank's random state, and how many ranks there were."""
        if not self._loads_before_preparing(checkpoint):
            with open_checkpoint(checkpoint, names=group_names(self.engine)) as loaded:
                return loaded.rng_state(self.args.process_index), loaded.world_size
        alone = self.args.world_size == 1
        name = "rng_state.pth" if alone else f"rng_state_{self.args.process_index}.pth"
        path = checkpoint / name
        if not path.is_file():
            return None, 1
        require_whole_zip(path)
        with safe_globals():
            return torch.load(path, weights_only=True), self.args.world_size

    # ---- Weights alone ----

    def load_resumed_weights(self) -> Path | None:
        """The checkpoint that `train` would go on from, its weights now in the model and its step
        the trainer's, for an evaluation without training. All ranks call it."""
        checkpoint = self._checkpoint_to_resume(None)
        if checkpoint is None:
            return None
        if self._loads_before_preparing(checkpoint):
            self._load_from_checkpoint(checkpoint)
        else:
            self._prepare_to_evaluate()
            self._restore_weights(checkpoint)
        self.state = _saved_state(checkpoint) or self.state
        return checkpoint

    # ---- The best model, at the end ----

    def _load_best_model(self) -> None:
        """Weights of the best checkpoint, into the prepared model. All ranks call it.

        Raises CheckpointError on all ranks or on none: what is whole must not be rotated away by
        those that could read their share.
        """
        ranks = self.args.ranks
        best = Path(str(self.state.best_model_checkpoint))
        logger.info("loading the best model from %s (score %s)", best, self.state.best_metric)
        if not all(gather_all(ranks, best.is_dir())):
            logger.warning(
                "could not locate the best model at %s; on several nodes, save where all can read",
                best,
            )
        elif is_ours(best) and not _is_peft_model(self.model):
            self._restore_weights(best)
        else:
            attempt(ranks, lambda: self._load_from_checkpoint(best))


def _saved_state(checkpoint: Path) -> TrainerState | None:
    """The trainer's state of a checkpoint, where it has any; CheckpointError where it no longer is
    one."""
    path = checkpoint / TRAINER_STATE_FILE
    if not path.is_file():
        return None
    require_trainer_state(path)
    return trainer_state(path)


def _is_others(path: Path) -> bool:
    """Whether another tool wrote it, or has made of it what only others' ways of loading read."""
    if is_ours(path) or lost_manifest(path):
        return False
    return is_foreign(path) or is_transformers(path)


def _say_that_nothing_is_verified(path: Path) -> None:
    """Of what has no manifest: a warning where bigtrain saved it, since it once had one."""
    logger.log(
        logging.WARNING if _has_our_arguments(path) else logging.INFO,
        "%s has no manifest that describes it: it is gone on from as another tool's, and whether "
        "its weights are those that were saved can't be told",
        path,
    )


def _has_our_arguments(path: Path) -> bool:
    try:
        saved = Archive(path / TRAINING_ARGS_FILE).read()
    except (CheckpointError, OSError):
        return False
    values = saved.state if isinstance(saved, Inert) else None
    return isinstance(values, dict) and "on_save_failure" in values
