"""What every part of the trainer stands on: its attributes, the engine, callbacks, the model.

The trainer is one class, so that any of its methods can be overridden; its parts are read one by
one: core, batches, optimization, forward, reporting, evaluation, saving, resume, loop.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.integrations.integration_utils import (
    TensorBoardCallback,
    get_reporting_integration_callbacks,
)
from transformers.trainer_callback import (
    CallbackHandler,
    DefaultFlowCallback,
    ExportableState,
    PrinterCallback,
    ProgressCallback,
)
from transformers.trainer_pt_utils import LabelSmoother
from transformers.trainer_utils import TrainerMemoryTracker, number_of_arguments
from transformers.utils.import_utils import is_in_notebook

from bigtrain.engine import process_group
from bigtrain.engine.factory import build_engine
from bigtrain.engine.protocol import Engine
from bigtrain.plan import RunPlan
from bigtrain.trainer import choice, environment, introspection, processes
from bigtrain.trainer.accelerator import Accelerator
from bigtrain.trainer.arguments import TrainingArguments
from bigtrain.trainer.reporter import Reporter
from bigtrain.trainer.stopping import StopFlag
from bigtrain.translate.config import EngineConfig

logger = logging.getLogger(__name__)
# What transformers' Trainer says too comes under its name: people look, and filter, there.
their_logger = transformers.logging.get_logger("transformers.trainer")

# Events of every step that few callbacks hear; the handler itself does nothing at them.
_MERELY_TOLD = {"on_pre_optimizer_step", "on_optimizer_step", "on_substep_end"}


class TrainerCore:
    """The state that all parts share. Attributes without an underscore are users' too."""

    args: TrainingArguments
    model: nn.Module
    model_wrapped: nn.Module
    model_init: Callable[..., nn.Module] | None
    engine: Engine
    accelerator: Accelerator
    data_collator: Callable[..., Any]
    train_dataset: Any
    eval_dataset: Any
    processing_class: Any
    compute_loss_func: Callable[..., Any] | None
    compute_metrics: Callable[..., Any] | None
    preprocess_logits_for_metrics: Callable[..., Any] | None
    optimizer: Optimizer | None
    lr_scheduler: Any
    optimizer_cls_and_kwargs: tuple[Any, dict[str, Any]] | None
    callback_handler: CallbackHandler
    state: TrainerState
    control: TrainerControl
    label_names: list[str]
    neftune_hook_handle: Any
    is_in_train: bool
    is_model_parallel: bool
    place_model_on_device: bool
    deepspeed: nn.Module | None
    """DeepSpeed's wrapper of the model, once a ZeRO engine has made it."""
    is_fsdp_xla_enabled = is_fsdp_xla_v1_enabled = is_fsdp_xla_v2_enabled = False
    is_distributed_loading_by_transformers = False
    current_flos: float
    _memory_tracker: TrainerMemoryTracker
    _eval_dataloaders: dict[str, Any]
    label_smoother: LabelSmoother | None
    loss_is_scaled_for_ga: bool | None = None
    """Whether `compute_loss` returns a loss that is already normalised over the whole accumulated
    batch. None: True when it was normalised by `num_items_in_batch`. Subclasses that compute
    their own loss should say it."""

    # ---- Engine ----

    def _set_up_engine(self, model: nn.Module | None, engine: Engine | None) -> None:
        self._take_accumulation_from_accelerator_config()
        self._plan: RunPlan | None = environment.plan()
        self._engine_config: EngineConfig = self._choose_engine(model)
        if self.args.world_size > 1:
            process_group.join(
                self.args.ranks, device=self.args.device, timeout_s=self.args.ddp_timeout
            )
        processes.tell_accelerate(self.args.ranks, self.args.device)
        self._use_engine(engine or self._build_engine())
        self._stop = StopFlag(device=self.engine.device, is_armed=self._plan is not None)
        self._has_exchanged = False  # whether this batch's all-reduce has carried the stop flag
        self._reporter = Reporter(args=self.args, device=self.engine.device)

    def _choose_engine(self, model: nn.Module | None) -> EngineConfig:
        return choice.engine_config(
            self.args, plan=self._plan, hidden_size=introspection.hidden_size(model)
        )

    def _take_accumulation_from_accelerator_config(self) -> None:
        config: Any = self.args.accelerator_config
        steps = (config.gradient_accumulation_kwargs or {}).get("num_steps")
        if steps is None:
            return
        if self.args.gradient_accumulation_steps > 1:
            raise ValueError(
                "The `AcceleratorConfig`'s `num_steps` is set but `gradient_accumulation_steps` is "
                "greater than 1 in the passed `TrainingArguments`; set one of the two"
            )
        self.args.gradient_accumulation_steps = steps

    def create_accelerator_and_postprocess(self) -> None:
        """What answers scripts in accelerate's place, and the flags that go with it. Called when
        there is an engine, which trains in its place; override to add to it."""
        config: Any = self.args.accelerator_config
        self.accelerator = Accelerator(
            self.engine,
            ranks=self.args.ranks,
            mixed_precision=self.args.mixed_precision,
            config=config,
            data_seed=self.args.data_seed,
            settings=self._engine_config.settings,
        )
        self.accelerator.trained = getattr(self, "model", None)
        self.is_deepspeed_enabled = self.accelerator.deepspeed_plugin is not None
        self.is_fsdp_enabled = self.accelerator.fsdp_plugin is not None
        self._reset_gather()

    def get_tp_size(self) -> int:
        """Ranks that share a layer: one, for data parallelism is the only kind here."""
        return 1

    def get_cp_size(self) -> int:
        """Ranks that share a sequence by ring attention: one."""
        return 1

    def get_sp_size(self) -> int:
        """Ranks that share a sequence by all-to-all: one."""
        return 1

    def end(self) -> None:
        """Let the engine and the process group go. The last call of a script."""
        self.engine.close()
        process_group.leave()

    def _build_engine(self) -> Engine:
        return build_engine(self._engine_config, world=self.args.ranks, device=self.args.device)

    def _use_engine(self, engine: Engine) -> None:
        self.engine = engine
        self.create_accelerator_and_postprocess()
        self.accelerator.prepare_trained = self._prepare_trained
        self._is_prepared, self.deepspeed = False, None

    def _prepare_to_evaluate(self) -> None:
        """Make the model the engine's without an optimizer, if nothing has prepared it yet."""
        if not self._is_prepared:
            self._take_wrapped(self.accelerator.prepare_model(self.model, evaluation_mode=True))

    def _take_wrapped(self, wrapped: nn.Module) -> None:
        """The model as the engine has prepared it."""
        self.model_wrapped, self._is_prepared = wrapped, True
        by_deepspeed = self.is_deepspeed_enabled and wrapped is not self.model
        self.deepspeed = wrapped if by_deepspeed else None

    def _prepare_trained(self) -> tuple[nn.Module, Optimizer | None]:
        """Model and optimizer as the engine trains them, for a loop of the script's own."""
        raise NotImplementedError

    def _reset_gather(self) -> None:
        self.gather_function = functools.partial(
            self.accelerator.gather_for_metrics,
            use_gather_object=self.args.eval_use_gather_object,
        )

    # ---- Model ----

    def call_model_init(self, trial: Any = None) -> nn.Module:
        """A fresh model from `model_init`."""
        if self.model_init is None:
            raise RuntimeError("`Trainer` requires either a `model` or `model_init` argument")
        expected = number_of_arguments(self.model_init)
        if expected > 1:
            raise RuntimeError("model_init should have 0 or 1 argument.")
        model = self.model_init(trial) if expected == 1 else self.model_init()
        if model is None:
            raise RuntimeError("model_init should not return None.")
        introspection.check_is_module(model, source="what model_init returns")
        return model

    def _adopt_model(self, model: nn.Module) -> None:
        """Make `model` the trainer's: on its device where it stays whole, and looked through."""
        introspection.check_trainable(model)
        self.is_model_parallel = introspection.is_spread(model, self.args.device)
        asked = self.args.place_model_on_device
        self.place_model_on_device = self._keeps_whole_model(model) if asked is None else asked
        if self.place_model_on_device and introspection.can_be_moved(model):
            self._move_model_to_device(model, self.args.device)
        self.model = self.model_wrapped = self.accelerator.trained = model
        self._original_dtypes = introspection.original_dtypes(model)
        facts = introspection.inspect_model(model)
        self.model_accepts_loss_kwargs = facts.accepts_loss_kwargs
        self._ignores_count = False  # until a step has shown it
        self._watches_count = facts.accepts_loss_kwargs and not facts.declares_loss_kwargs
        self.can_return_loss = facts.can_return_loss
        self._loss_shifts_labels = facts.loss_shifts_labels
        named = self.args.label_names
        self.label_names = facts.label_names if named is None else named
        if getattr(model, "config", None) is not None:
            model.config.use_cache = self.args.use_cache  # type: ignore[union-attr]
        self._signature_columns: list[str] | None = None
        self._flos_per_token: int | None = None

    def _keeps_whole_model(self, model: nn.Module) -> bool:
        """Whether it goes to the device now: not where the engine shards it, where it lies on
        several devices, or where an evaluation casts and moves it at once."""
        args = self.args
        return not (
            self.engine.is_sharded
            or self.is_model_parallel
            or args.fp16_full_eval
            or args.bf16_full_eval
        )

    def _move_model_to_device(self, model: nn.Module, device: torch.device) -> None:
        model.to(device)

    # ---- Callbacks ----

    def _set_up_callbacks(self, callbacks: list[Any] | None) -> None:
        args = self.args
        reporting = [self._reporting_callback(c) for c in self._reporting_classes()]
        defaults: list[Any] = [DefaultFlowCallback, *reporting]
        if args.enable_jit_checkpoint:
            from transformers.trainer_jit_checkpoint import JITCheckpointCallback

            on_signal = JITCheckpointCallback()
            on_signal.set_trainer(self)
            defaults.append(on_signal)
        self.callback_handler = CallbackHandler(
            defaults + list(callbacks or []),
            self.model,
            self.processing_class,
            self.optimizer,
            self.lr_scheduler,
        )
        # With bigtrain's launcher, rank 0's events make one calm line; else as transformers does.
        if not environment.has_console():
            self.add_callback(PrinterCallback if args.disable_tqdm else _progress_callback())

    def _reporting_classes(self) -> list[type[TrainerCallback]]:
        classes: list[type[TrainerCallback]] = get_reporting_integration_callbacks(
            self.args.report_to
        )
        return classes

    def _reporting_callback(self, callback: type[TrainerCallback]) -> Any:
        if callback is TensorBoardCallback and self.args.logging_dir is not None:
            board = TensorBoardCallback()
            board.logging_dir = str(self.args.tensorboard_dir())
            return board
        return callback

    def add_callback(self, callback: type[TrainerCallback] | TrainerCallback) -> None:
        """Add a callback, as an instance or a class to make one of."""
        self.callback_handler.add_callback(callback)

    def pop_callback(
        self, callback: type[TrainerCallback] | TrainerCallback
    ) -> TrainerCallback | None:
        """Take out a callback and return it; None when it is not there."""
        popped: TrainerCallback | None = self.callback_handler.pop_callback(callback)
        return popped

    def remove_callback(self, callback: type[TrainerCallback] | TrainerCallback) -> None:
        """Take out a callback."""
        self.callback_handler.remove_callback(callback)

    def _stateful_callbacks(self) -> list[ExportableState]:
        candidates = [*self.callback_handler.callbacks, self.control]
        return [callback for callback in candidates if isinstance(callback, ExportableState)]

    def _new_state(self) -> TrainerState:
        callbacks: Any = self._stateful_callbacks()
        return TrainerState(stateful_callbacks=callbacks)

    def _fire(self, event: str, **values: Any) -> None:
        """Call an event of every callback: they may change the control."""
        if event in _MERELY_TOLD and not self._is_heard(event):
            return
        on_event = getattr(self.callback_handler, event)
        self.control = on_event(self.args, self.state, self.control, **values)

    def _is_heard(self, event: str) -> bool:
        """Whether any callback does something at it."""
        base = getattr(TrainerCallback, event)
        return type(self.callback_handler) is not CallbackHandler or any(
            getattr(getattr(callback, event), "__func__", None) is not base
            for callback in self.callback_handler.callbacks
        )

    # ---- Place in the run ----

    def is_local_process_zero(self) -> bool:
        """True on the first process of every node."""
        return self.args.local_process_index == 0

    def is_world_process_zero(self) -> bool:
        """True on one process of the whole run."""
        return self.args.process_index == 0

    def _get_output_dir(self, trial: Any = None) -> str:
        return str(self.args.output_dir)

    def _hp_search_setup(self, trial: Any) -> None:
        """Before a training: where it is a trial of a search, take its values."""

    def _report_to_hp_search(self, trial: Any, step: int, metrics: dict[str, float]) -> None:
        """After an evaluation: where it is a trial of a search, tell how it does."""

    def _output_dir(self) -> Path:
        return Path(str(self.args.output_dir))

    def _make_output_dir(self) -> None:
        if self.args.should_save:
            self._output_dir().mkdir(parents=True, exist_ok=True)

    def _set_up_logs(self) -> None:
        args = self.args
        transformers.logging.set_verbosity(args.get_process_log_level())
        asked = args.log_level if args.should_log else args.log_level_replica
        if asked != "passive":
            logging.getLogger("bigtrain").setLevel(args.get_process_log_level())

    def _new_memory_tracker(self) -> TrainerMemoryTracker:
        return TrainerMemoryTracker(self.args.skip_memory_metrics)

    def compute_loss_context_manager(self) -> contextlib.AbstractContextManager[None]:
        """Around every forward pass: the engine's compute precision."""
        return self.autocast_smart_context_manager()

    def autocast_smart_context_manager(
        self, cache_enabled: bool | None = True
    ) -> contextlib.AbstractContextManager[None]:
        return self.engine.autocast()

    def _as_device_tensor(self, value: float) -> Tensor:
        return torch.tensor(value, device=self.engine.device)


def _progress_callback() -> type[TrainerCallback]:
    """A bar on a terminal, a table in a notebook."""
    if not is_in_notebook():
        return ProgressCallback  # type: ignore[no-any-return]
    from transformers.utils.notebook import NotebookProgressCallback

    return NotebookProgressCallback  # type: ignore[no-any-return]
