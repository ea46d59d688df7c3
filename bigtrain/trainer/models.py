"""The model as others load it: weights, config, tokenizer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel
from transformers.trainer_utils import _is_peft_model, unwrap_peft_model

from bigtrain.checkpoint.agreement import on_main
from bigtrain.checkpoint.exported import exporting
from bigtrain.trainer.reporting import Reporting

TRAINING_ARGS_FILE = "training_args.bin"
SAFETENSORS_FILE = "model.safetensors"
TORCH_FILE = "pytorch_model.bin"


class Models(Reporting):
    """What the trainer writes of its model."""

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the model so that `from_pretrained` loads it, with config and tokenizer.

        All ranks call it; the main one writes. Weights have the precision the model came with.
        """
        directory = output_dir or str(self.args.output_dir)
        if not self._is_prepared:
            state_dict = dict(self.model.state_dict()) if self.args.should_save else {}
        else:
            state_dict = self._whole_weights(keep_masters=_internal_call)
        if _internal_call:
            if self.args.should_save:
                self._save(directory, state_dict=state_dict)
        elif self._is_prepared and self.engine.is_sharded:
            on_main(self.args.ranks, lambda: self._export(Path(directory), state_dict))
        elif self.args.should_save:
            # Scripts may call this on the main process alone.
            self._export(Path(directory), state_dict)

    def _export(self, directory: Path, state_dict: dict[str, Tensor]) -> None:
        nbytes = sum(tensor.nbytes for tensor in state_dict.values())
        with exporting(directory, nbytes=nbytes) as staging:
            self._save(str(staging), state_dict=state_dict)

    def _whole_weights(self, *, keep_masters: bool) -> dict[str, Tensor]:
        """All weights on the main rank's CPU, each as it gets there; none on other ranks."""
        weights: dict[str, Tensor] = {}
        for name, tensor in self.engine.full_weights():
            if tensor is not None and self.args.should_save:
                dtype = self._original_dtypes.get(name, tensor.dtype)
                weights[name] = tensor if keep_masters else tensor.to(dtype)
        return weights

    def _save(
        self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None
    ) -> None:
        """Write model, tokenizer and arguments from one process."""
        directory = Path(output_dir) if output_dir else self._output_dir()
        directory.mkdir(parents=True, exist_ok=True)
        if state_dict is None:
            state_dict = dict(self.model.state_dict())
        self._save_weights(directory, state_dict)
        self._save_companions(directory)

    def _save_weights(self, directory: Path, state_dict: dict[str, Tensor]) -> None:
        model: Any = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        if not self.args.save_safetensors and not _is_peft_model(model):
            torch.save(state_dict, directory / TORCH_FILE)
            self._save_config(directory)
        elif isinstance(model, PreTrainedModel) or _is_peft_model(model):
            dtype = next((t.dtype for t in state_dict.values() if t.is_floating_point()), None)
            with _without_progress_bar():
                model.save_pretrained(str(directory), state_dict=state_dict)
            if isinstance(model, PreTrainedModel) and dtype not in (None, model.dtype):
                _say_dtype(model.config, directory, dtype)
        else:
            path = str(directory / SAFETENSORS_FILE)
            safetensors.torch.save_file(
                _without_aliases(state_dict), path, metadata={"format": "pt"}
            )

    def _save_config(self, directory: Path) -> None:
        model: Any = self.accelerator.unwrap_model(self.model)
        if _is_peft_model(model):
            model.peft_config[model.active_adapter].save_pretrained(str(directory))
        model = unwrap_peft_model(model)
        config: Any = getattr(model, "config", None)
        if hasattr(config, "save_pretrained"):
            if isinstance(model, PreTrainedModel):
                config.architectures = [model.__class__.__name__.removeprefix("FSDP")]
            config.save_pretrained(str(directory))
        generation = getattr(model, "generation_config", None)
        if generation is not None and model.can_generate():
            generation.save_pretrained(str(directory))

    def _save_companions(self, directory: Path) -> None:
        """Tokenizer or processor, and the arguments."""
        tokenizer = self.processing_class or getattr(self.data_collator, "tokenizer", None)
        if tokenizer is not None:
            tokenizer.save_pretrained(str(directory))
        torch.save(self.args, directory / TRAINING_ARGS_FILE)


@contextmanager
def _without_progress_bar() -> Iterator[None]:
    """A bar for every checkpoint would cut the training's own to pieces."""
    was_on = transformers.logging.is_progress_bar_enabled()
    transformers.logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_on:
            transformers.logging.enable_progress_bar()


def _say_dtype(config: Any, directory: Path, dtype: torch.dtype | None) -> None:
    """Let the saved config name the precision of the weights beside it.

    `save_pretrained` writes the live model's, which is that of the masters or of the arithmetic.
    """
    live, config.dtype = config.dtype, dtype
    config.save_pretrained(str(directory))
    config.dtype = live


def _without_aliases(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """safetensors stores no two names for one storage: the first name stays."""
    seen: set[tuple[int, tuple[int, ...]]] = set()
    kept: dict[str, Tensor] = {}
    for name, tensor in state_dict.items():
        place = (tensor.data_ptr(), tuple(tensor.shape))
        if tensor.numel() and place in seen:
            continue
        seen.add(place)
        kept[name] = tensor.contiguous()
    return kept
