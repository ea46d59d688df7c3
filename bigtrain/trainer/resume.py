"""Going on from a checkpoint: which one, what of it, and where the data continues.

bigtrain's own checkpoints load into any engine. One that transformers wrote (no manifest) loads
where the model is whole on every rank.
"""

from __future__ import annotations

import logging
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import TrainerState
from transformers.trainer_callback import TrainerControl
from transformers.trainer_pt_utils import safe_globals
from transformers.trainer_utils import (
    _is_peft_model,
    compare_trainer_and_checkpoint_args,
    get_last_checkpoint,
    load_sharded_checkpoint,
)

from bigtrain.checkpoint.find import find_checkpoint, require_checkpoint
from bigtrain.checkpoint.load import open_checkpoint
from bigtrain.checkpoint.manifest import MANIFEST
from bigtrain.errors import CheckpointError
from bigtrain.trainer import collectives, environment, rng
from bigtrain.trainer.saving import (
    SAFETENSORS_FILE,
    TORCH_FILE,
    TRAINER_STATE_FILE,
    Saving,
)

logger = logging.getLogger(__name__)


class NoCheckpointError(CheckpointError, ValueError):
    """Nothing to resume from. Also the ValueError that scripts for transformers' Trainer expect."""


class Resume(Saving):
    """What the trainer reads back."""

    # ---- Which ----

    def _checkpoint_to_resume(self, asked: str | bool | None) -> Path | None:
        """The checkpoint that `train(resume_from_checkpoint=asked)` means. All ranks call it.

        What the launcher was told counts before what the script says, and after a restart what
        this attempt has committed.
        """
        if environment.is_restarted():
            own = self._last_checkpoint(since=environment.plan_written())
            if own is not None:
                return own
        planned = self._plan.resume if self._plan is not None else "script"
        if planned == "auto":
            return self._last_checkpoint()
        if planned == "never":
            return None
        if planned != "script":
            asked = planned
        if asked is None and self.args.overwrite_output_dir:
            return self._last_checkpoint()
        if asked is None or asked is False:
            return None
        if asked is True:
            found = self._last_checkpoint()
            if found is None:
                raise NoCheckpointError(
                    f"No valid checkpoint found in output directory ({self.args.output_dir})"
                )
            return found
        path = Path(asked)
        if path.is_dir() and not _is_ours(path) and _is_transformers(path):
            return path
        try:
            return require_checkpoint(path)
        except CheckpointError as error:
            raise NoCheckpointError(f"Can't find a valid checkpoint at {path}: {error}") from error

    def _last_checkpoint(self, *, since: datetime | None = None) -> Path | None:
        """The newest that verifies, committed after `since`; decided by rank 0 for all."""
        found = self._find_last(since) if self.is_world_process_zero() else None
        path: Path | None = collectives.from_main(found)
        if path is not None:
            logger.info("going on from %s", path)
        return path

    def _find_last(self, since: datetime | None) -> Path | None:
        directory = self._output_dir()
        if not directory.is_dir():
            return None
        found = find_checkpoint(directory, since=since, resumable=True)
        for path, why in found.passed_over:
            if not (_is_transformers(path) and not _is_ours(path)):
                logger.warning("%s is passed over: %s", path, why)
        if found.path is not None or since is not None:
            return found.path
        last = get_last_checkpoint(str(directory))
        if last is None or _is_ours(Path(last)) or not _is_transformers(Path(last)):
            return None
        return Path(last)

    # ---- What ----

    def _load_state(self, checkpoint: Path | None, *, max_steps: int) -> None:
        """The trainer's own state, from the checkpoint where it has one."""
        if checkpoint is None or not (checkpoint / TRAINER_STATE_FILE).is_file():
            return
        self.state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_FILE))
        best = self.state.best_model_checkpoint
        if best is not None and not Path(best).is_dir():
            logger.warning("the best checkpoint %s is gone; going on without it", best)
            self.state.best_model_checkpoint = None
        if self.state.train_batch_size is not None:
            compare_trainer_and_checkpoint_args(self.args, self.state)
        # The arguments of now count; what was saved is only compared with them.
        self.state.compute_steps(self.args, max_steps)
        self._load_callback_state()

    def _load_callback_state(self) -> None:
        """Callbacks as they were, when `restore_callback_states_from_checkpoint` asks for it."""
        if not self.args.restore_callback_states_from_checkpoint:
            return
        missing = []
        present = [*self.callback_handler.callbacks, self.control]
        states_of: Any = self.state.stateful_callbacks
        for name, saved in states_of.items():
            matching = [one for one in present if one.__class__.__name__ == name]
            if not matching:
                missing.append(name)
            states = saved if isinstance(saved, list) else [saved]
            for callback, state in zip(matching, states, strict=False):
                self._restore_callback(callback, state)
        if missing:
            logger.warning("the checkpoint has states of callbacks that are not here: %s", missing)

    def _restore_callback(self, callback: Any, state: dict[str, Any]) -> None:
        restored = type(callback)(**state.get("args", {}))
        for name, value in state.get("attributes", {}).items():
            setattr(restored, name, value)
        if isinstance(callback, TrainerControl):
            self.control = restored
            return
        self.callback_handler.remove_callback(callback)
        self.callback_handler.add_callback(restored)

    def _load_training(self, checkpoint: Path) -> None:
        """Weights, optimizer, scheduler and loss scale into what is prepared. All ranks call it."""
        if not _is_ours(checkpoint):
            self._load_foreign_optimizer(checkpoint)
            return
        with open_checkpoint(checkpoint) as loaded:
            self._require_resumable(checkpoint, loaded.source.param_groups is not None)
            self._run_id = loaded.manifest.run_id
            self._samples_seen = loaded.progress.samples_seen
            self.engine.load_local_state(loaded.source, optimizer=True)
            scheduler = loaded.scheduler_state()
            if scheduler is not None:
                self.lr_scheduler.load_state_dict(scheduler)
            self.engine.load_scaler_state(loaded.scaler_state())

    def _load_rng_state(self, checkpoint: str | Path | None) -> None:
        """This rank's random generators as they were when the checkpoint was saved."""
        if checkpoint is None:
            return
        states = self._saved_rng(Path(checkpoint))
        if states is None:
            logger.info("%s has no random state of this rank: it draws anew", checkpoint)
            return
        rng.restore(states, self.engine.device)

    def _saved_rng(self, checkpoint: Path) -> dict[str, Any] | None:
        if _is_ours(checkpoint):
            with open_checkpoint(checkpoint) as loaded:
                return loaded.rng_state(self.args.process_index)
        alone = self.args.world_size == 1
        name = "rng_state.pth" if alone else f"rng_state_{self.args.process_index}.pth"
        path = checkpoint / name
        if not path.is_file():
            return None
        with safe_globals():
            return torch.load(path, weights_only=True)  # type: ignore[no-any-return]

    # ---- transformers' own checkpoints ----

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str | Path, model: nn.Module | None = None
    ) -> None:
        """Weights that transformers wrote, into the whole model."""
        directory = Path(resume_from_checkpoint)
        model = self.model if model is None else model
        if self.engine.is_sharded:
            raise CheckpointError(
                f"{directory} was not written by bigtrain (it has no {MANIFEST}), and engine "
                f"{self.engine.name} can't load it; load it as the model, or use engine ddp"
            )
        if _is_peft_model(model):
            adapter = model.active_adapters[0]  # type: ignore[index,union-attr]
            model.load_adapter(str(directory), adapter, is_trainable=True)  # type: ignore[operator]
        elif (directory / SAFETENSORS_FILE).is_file():
            self._fill(model, load_file(str(directory / SAFETENSORS_FILE)))
        elif (directory / TORCH_FILE).is_file():
            self._fill(
                model, torch.load(directory / TORCH_FILE, map_location="cpu", weights_only=True)
            )
        else:
            load_sharded_checkpoint(model, str(directory), strict=False)

    def _fill(self, model: nn.Module, state_dict: dict[str, Any]) -> None:
        result = model.load_state_dict(state_dict, strict=False)
        if hasattr(model, "tie_weights"):
            model.tie_weights()  # type: ignore[operator]
        tied = set(getattr(model, "_tied_weights_keys", None) or ())
        missing = [name for name in result.missing_keys if name not in tied]
        if missing:
            logger.warning("There were missing keys in the checkpoint model loaded: %s", missing)
        if result.unexpected_keys:
            logger.warning(
                "There were unexpected keys in the checkpoint model loaded: %s",
                result.unexpected_keys,
            )

    def _load_foreign_optimizer(self, checkpoint: Path) -> None:
        optimizer, scheduler = checkpoint / "optimizer.pt", checkpoint / "scheduler.pt"
        self._require_resumable(checkpoint, optimizer.is_file() and scheduler.is_file())
        device = str(self.engine.device)
        state = torch.load(optimizer, map_location=device, weights_only=True)
        if self.optimizer is not None:
            self.optimizer.load_state_dict(state)
        self.lr_scheduler.load_state_dict(torch.load(scheduler, weights_only=True))
        scaler = checkpoint / "scaler.pt"
        if scaler.is_file():
            self.engine.load_scaler_state(torch.load(scaler, weights_only=True))

    # ---- The best model, at the end ----

    def _load_best_model(self) -> None:
        """Weights of the best checkpoint, into the prepared model. All ranks call it."""
        best = Path(str(self.state.best_model_checkpoint))
        logger.info("loading the best model from %s (score %s)", best, self.state.best_metric)
        if not best.is_dir():
            logger.warning(
                "could not locate the best model at %s; on several nodes, save where all can read",
                best,
            )
        elif _is_ours(best) and not _is_peft_model(self.model):
            with open_checkpoint(best) as loaded:
                self.engine.load_local_state(loaded.source, optimizer=False)
        else:
            self._load_from_checkpoint(best)


def _is_ours(directory: Path) -> bool:
    return (directory / MANIFEST).is_file()


def _is_transformers(directory: Path) -> bool:
    names = (
        SAFETENSORS_FILE,
        TORCH_FILE,
        f"{SAFETENSORS_FILE}.index.json",
        f"{TORCH_FILE}.index.json",
        "adapter_model.safetensors",
        "adapter_model.bin",
    )
    return any((directory / name).is_file() for name in names)
