"""`trainer.accelerator`: what scripts ask accelerate's `Accelerator` for, answered by the engine.

It is not an `Accelerator` and prepares no model: the engine has it, the optimizer and the process
group.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import accelerate
import torch
from accelerate.state import GradientState
from accelerate.utils import GradientAccumulationPlugin
from accelerate.utils.operations import recursively_apply
from accelerate.utils.other import is_compiled_module
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim import Optimizer
from torch.utils.data import DataLoader
from transformers.trainer_pt_utils import AcceleratorConfig

from bigtrain.engine.protocol import Engine
from bigtrain.engine.state import nothing_learns
from bigtrain.errors import UnsupportedError
from bigtrain.topology import RankInfo
from bigtrain.trainer import collectives, plugins, sharding
from bigtrain.trainer.accelerate_names import ANSWERS, INSTEAD
from bigtrain.trainer.processes import Processes
from bigtrain.translate.config import EngineSettings

_WRAPPERS = (DistributedDataParallel, DataParallel)


class NotInStandInError(UnsupportedError, AttributeError):
    """A name of accelerate's Accelerator that this one lacks; for `hasattr` it is not there."""


class Accelerator(Processes):
    """The place of this process, and collectives, as accelerate names them."""

    def __init__(
        self,
        engine: Engine,
        *,
        ranks: RankInfo,
        mixed_precision: str,
        config: AcceleratorConfig,
        data_seed: int | None,
        settings: EngineSettings,
    ) -> None:
        vars(self).update(copy.deepcopy(dict(ANSWERS)))
        self._config, self._data_seed = config, data_seed
        self.trained: nn.Module | None = None
        """The trainer's own model, which the engine prepares."""
        self.prepare_trained: Callable[[], tuple[nn.Module, Optimizer | None]] | None = None
        """Gives the trainer's model and optimizer to the engine, for a loop of the script's own."""
        self.optimizer_step_was_skipped = False
        """Whether the last step's gradients overflowed, so that nothing was updated."""
        self.fsdp_plugin = plugins.fsdp(settings)
        self.deepspeed_plugin = plugins.deepspeed(settings)
        self.engine = engine
        self.ranks = ranks
        self.mixed_precision = mixed_precision
        accumulation = {**(config.gradient_accumulation_kwargs or {}), "num_steps": 1}
        self.gradient_state = GradientState(GradientAccumulationPlugin(**accumulation))
        # Of this trainer alone: the state above is shared by all of a process.
        self.syncs_each_batch = bool(accumulation.get("sync_each_batch", False))
        """Whether gradients are reduced after every micro-batch, as the arguments ask."""
        self.split_batches = config.split_batches
        self.dispatch_batches = config.dispatch_batches
        self.even_batches = config.even_batches
        self.use_seedable_sampler = config.use_seedable_sampler
        self.non_blocking = config.non_blocking

    def prepare(self, *objects: Any, **_: Any) -> Any:
        """Data loaders cut to this rank's share; a scheduler as it is; the trainer's model and
        optimizer as the engine trains them. Others that are to be trained: UnsupportedError."""
        prepared = tuple(self._prepare_one(one) for one in objects)
        return prepared[0] if len(prepared) == 1 else prepared

    def _prepare_one(self, one: Any) -> Any:
        if isinstance(one, DataLoader):
            return self.prepare_data_loader(one)
        if not isinstance(one, (nn.Module, Optimizer)):
            return one
        if one is self.trained and self.prepare_trained is not None:
            return self.prepare_trained()[0]
        if isinstance(one, Optimizer) and self.prepare_trained is not None:
            _, optimizer = self.prepare_trained()
            if one is optimizer:
                return one
        raise UnsupportedError(
            f"accelerator.prepare({type(one).__name__}): the engine prepares the trainer's "
            "model and optimizer alone; for a model beside it that is not trained there is "
            "accelerator.prepare_model(model, evaluation_mode=True)"
        )

    def prepare_data_loader(self, data_loader: DataLoader[Any], **_: Any) -> DataLoader[Any]:
        """This rank's share of a loader that knows nothing of ranks."""
        loader: DataLoader[Any] = sharding.shard(
            data_loader,
            ranks=self.ranks,
            device=self.device,
            config=self._config,
            data_seed=self._data_seed,
        )
        return loader

    def prepare_model(
        self, model: nn.Module, device_placement: bool | None = None, evaluation_mode: bool = False
    ) -> nn.Module:
        """A model beside the trained one, on the device and whole; the trained one as the engine
        evaluates it."""
        if evaluation_mode and model is self.trained:
            return self.engine.prepare(model, None)
        if not evaluation_mode:
            raise UnsupportedError(
                "accelerator.prepare_model: the engine prepares the model that is trained; say "
                "evaluation_mode=True for another"
            )
        return model if device_placement is False else model.to(self.device)

    def prepare_scheduler(self, scheduler: Any) -> Any:
        """The scheduler as it is: the loop steps it."""
        return scheduler

    def skip_first_batches(self, dataloader: Any, num_batches: int = 0) -> Any:
        """A loader that starts at its batch `num_batches`."""
        return sharding.skip_batches(dataloader, num_batches) if num_batches else dataloader

    @property
    def state(self) -> Accelerator:
        """What scripts ask `accelerator.state` for is answered here too."""
        return self

    @property
    def native_amp(self) -> bool:
        return self.mixed_precision != "no"

    @property
    def is_fsdp2(self) -> bool:
        return self.fsdp_plugin is not None

    @property
    def gradient_accumulation_steps(self) -> int:
        """One: the loop accumulates, in windows of `args.gradient_accumulation_steps`."""
        return int(self.gradient_state.num_steps)

    def accumulate(self, *models: nn.Module) -> AbstractContextManager[None]:
        """Nothing more: the loop has decided which micro-batch ends a window."""
        return nullcontext()

    def maybe_context_parallel(self, *_: Any, **__: Any) -> AbstractContextManager[None]:
        """Nothing: no sequence is shared out here."""
        return nullcontext()

    def __getattr__(self, name: str) -> Any:
        if name in INSTEAD or (not name.startswith("_") and hasattr(accelerate.Accelerator, name)):
            instead = INSTEAD.get(name, "bigtrain trains on its engines, without accelerate")
            raise NotInStandInError(f"trainer.accelerator has no {name}: {instead}")
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    @property
    def sync_gradients(self) -> bool:
        """True in the last micro-batch of an accumulation window."""
        return bool(self.gradient_state.sync_gradients)

    def backward(self, loss: Tensor, **kwargs: Any) -> None:
        """The engine's backward pass. `kwargs` are for optimizers that need their own. ConfigError
        where no weight could learn from it."""
        if not loss.requires_grad and self.trained is not None:
            raise nothing_learns(self.trained)
        if kwargs:
            loss.backward(**kwargs)
        else:
            self.engine.backward(loss)

    def autocast(self, **_: Any) -> AbstractContextManager[None]:
        return self.engine.autocast()

    def no_sync(self, model: nn.Module | None = None) -> AbstractContextManager[None]:
        return self.engine.accumulating(last=False)

    def unwrap_model(
        self, model: nn.Module, keep_fp32_wrapper: bool = True, keep_torch_compile: bool = True
    ) -> nn.Module:
        """The module that was given to the trainer, out of DDP, DeepSpeed and `torch.compile`."""
        # accelerate's own imports deepspeed to ask whether it is one of its engines.
        compiled: Any = model if is_compiled_module(model) else None
        inner: Any = compiled._orig_mod if compiled is not None else model
        while isinstance(inner, _WRAPPERS) or _is_deepspeed_engine(inner):
            inner = inner.module
        if compiled is None or not keep_torch_compile:
            return inner  # type: ignore[no-any-return]
        compiled._orig_mod = inner
        return compiled  # type: ignore[no-any-return]

    def gather(self, tensor: Any) -> Any:
        return collectives.gather(tensor)

    def gather_for_metrics(self, input_data: Any, use_gather_object: bool = False) -> Any:
        """`gather`, without the samples that fill up the last batch of a data loader."""
        are_tensors = _all_tensors(input_data)
        if use_gather_object or not are_tensors:
            gathered = collectives.gather_objects(input_data)
            are_tensors = are_tensors and self.num_processes == 1
        else:
            gathered = collectives.gather(input_data)
        remainder = self.gradient_state.remainder
        if not self.gradient_state.end_of_dataloader or remainder <= 0:
            return gathered
        return _first(gathered, remainder) if are_tensors else gathered[:remainder]

    def pad_across_processes(
        self, tensor: Any, dim: int = 0, pad_index: int = 0, pad_first: bool = False
    ) -> Any:
        return collectives.pad(tensor, dim=dim, pad_index=pad_index, pad_first=pad_first)

    def reduce(self, tensor: Any, reduction: str = "sum", scale: float = 1.0) -> Any:
        """Sum, mean or max over ranks. `scale` counts on TPUs alone, in accelerate too."""
        return collectives.reduce(tensor, reduction)

    def clip_grad_norm_(
        self, parameters: Iterable[nn.Parameter], max_norm: float, norm_type: float = 2.0
    ) -> Tensor:
        return nn.utils.clip_grad_norm_(parameters, max_norm, norm_type=norm_type)

    def clip_grad_value_(self, parameters: Iterable[nn.Parameter], clip_value: float) -> None:
        """Before the engine's step; under fp16 the gradients are still scaled: UnsupportedError."""
        self.unscale_gradients()
        nn.utils.clip_grad_value_(parameters, clip_value)

    def unscale_gradients(self, optimizer: Optimizer | None = None) -> None:
        """Nothing without fp16; with it UnsupportedError, for the engine does it in its step."""
        if self.mixed_precision == "fp16":
            raise UnsupportedError(
                "accelerator.unscale_gradients: the engine unscales fp16 gradients in its step; "
                "set max_grad_norm, or use bf16"
            )

    def save(self, obj: Any, f: Any, safe_serialization: bool = False) -> None:
        """Write an object from the main process: as safetensors, or as torch does."""
        if not self.is_main_process:
            return
        if safe_serialization:
            save_file(obj, f, metadata={"format": "pt"})
        else:
            torch.save(obj, f)

    def get_state_dict(self, model: nn.Module | None = None, unwrap: bool = True) -> dict[str, Any]:
        """All weights on the CPU; empty on other ranks than 0. All ranks call it."""
        weights = self.engine.full_weights()
        return {name: tensor for name, tensor in weights if tensor is not None}

    def clear(self, *objects: Any) -> list[None]:
        """The engine keeps what it holds; the given objects are let go."""
        return [None for _ in objects]

    def free_memory(self, *objects: Any) -> list[None]:
        return [None for _ in objects]

    def end_training(self) -> None:
        self.engine.close()


def _is_deepspeed_engine(module: nn.Module) -> bool:
    """Without importing DeepSpeed, which takes seconds and is there when one exists."""
    deepspeed = sys.modules.get("deepspeed")
    return deepspeed is not None and isinstance(module, deepspeed.DeepSpeedEngine)


def _all_tensors(data: Any) -> bool:
    try:
        recursively_apply(lambda tensor: tensor, data, error_on_other_type=True)
    except TypeError:
        return False
    return True


def _first(data: Any, count: int) -> Any:
    """The first `count` samples of every tensor; one without dimensions (a loss) has none."""
    return recursively_apply(lambda tensor: tensor[:count] if tensor.ndim else tensor, data)
