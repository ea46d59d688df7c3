"""What transformers' own way of loading reads, where the model is whole on every rank: adapters,
and weights without an optimizer."""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn
from transformers.trainer_utils import _is_peft_model, load_sharded_checkpoint

from bigtrain.checkpoint.agreement import attempt
from bigtrain.checkpoint.find import lost_manifest, require_checkpoint
from bigtrain.checkpoint.foreign import is_foreign
from bigtrain.checkpoint.load import open_checkpoint, restore
from bigtrain.checkpoint.manifest import MANIFEST
from bigtrain.checkpoint.verify import require_whole_zip
from bigtrain.errors import CheckpointError
from bigtrain.trainer.candidates import is_ours
from bigtrain.trainer.models import SAFETENSORS_FILE, TORCH_FILE
from bigtrain.trainer.saving import Saving

logger = logging.getLogger(__name__)


class PlainWeights(Saving):
    """Checkpoints whose files are loaded whole."""

    _restored: Path | None = None  # what the engine was filled from last

    def _loads_before_preparing(self, checkpoint: Path) -> bool:
        """Whether only transformers' own way of loading reads it: adapters, or weights alone."""
        if is_ours(checkpoint):
            return False
        return _is_peft_model(self.model) or not is_foreign(checkpoint)

    def _restore_weights(self, checkpoint: Path) -> None:
        """Of one that any engine reads, the weights, into the engine. All ranks call it, and where
        one can't read its share, CheckpointError is raised on all."""
        ranks = self.args.ranks
        with attempt(ranks, lambda: open_checkpoint(checkpoint)) as loaded:
            restore(self.engine, loaded, world=ranks, optimizer=False)

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str | Path, model: nn.Module | None = None
    ) -> None:
        """A checkpoint's weights, into the model. At a resume each rank has read its own bytes of
        bigtrain's when this is called, and an override adds to that."""
        directory = Path(resume_from_checkpoint)
        if model is None and directory == self._restored:
            return
        is_trained = model is None or model is self.model
        model = self.model if model is None else model
        is_prepared = is_trained and self._is_prepared and not _is_peft_model(model)
        if is_ours(directory) and is_prepared:
            self._restore_weights(directory)
            return
        if lost_manifest(directory):
            require_checkpoint(directory)  # says so
        if self.engine.is_sharded and is_trained:
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
        scaler = checkpoint / "scaler.pt"
        for path in (optimizer, scheduler, scaler):
            attempt(self.args.ranks, partial(require_whole_zip, path))
        device = str(self.engine.device)
        state = torch.load(optimizer, map_location=device, weights_only=True)
        if self.optimizer is not None:
            self.optimizer.load_state_dict(state)
        self.lr_scheduler.load_state_dict(torch.load(scheduler, weights_only=True))
        if scaler.is_file():
            self.engine.load_scaler_state(torch.load(scaler, weights_only=True))
