"""`Trainer`: the same constructor and methods as transformers', on any engine."""

from __future__ import annotations

import inspect
import logging
import warnings
from collections.abc import Callable
from typing import Any

from torch import nn
from torch.optim import Optimizer
from transformers import (
    DataCollatorWithPadding,
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainerControl,
    default_data_collator,
)
from transformers.feature_extraction_sequence_utils import SequenceFeatureExtractor
from transformers.trainer_pt_utils import LabelSmoother
from transformers.trainer_utils import SaveStrategy, has_length

from bigtrain import rank_logging
from bigtrain.engine.protocol import Engine
from bigtrain.errors import UnsupportedError
from bigtrain.trainer import adoption, introspection, preparation, theirs
from bigtrain.trainer.arguments import TrainingArguments
from bigtrain.trainer.loop import Loop

logger = logging.getLogger(__name__)

_DEFAULT_OUTPUT_DIR = "tmp_trainer"


class Trainer(Loop):
    """Trains, evaluates and saves a model, in this process or in many.

    The parameters are those of `transformers.Trainer`. `engine` may be given where the model was
    made by it (`engine.construct`); else the run's plan says which engine, or the arguments do.
    """

    _args_class = TrainingArguments

    def __init__(
        self,
        model: nn.Module | None = None,
        args: theirs.TrainingArguments | None = None,
        data_collator: Callable[..., Any] | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        model_init: Callable[..., nn.Module] | None = None,
        compute_loss_func: Callable[..., Any] | None = None,
        compute_metrics: Callable[..., Any] | None = None,
        callbacks: list[type[TrainerCallback] | TrainerCallback] | None = None,
        optimizers: tuple[Optimizer | None, Any] = (None, None),
        optimizer_cls_and_kwargs: tuple[type[Optimizer], dict[str, Any]] | None = None,
        preprocess_logits_for_metrics: Callable[..., Any] | None = None,
        *,
        engine: Engine | None = None,
        tokenizer: Any = None,
    ) -> None:
        if tokenizer is not None:
            raise TypeError("Trainer takes no `tokenizer`: give it as `processing_class`")
        if args is None:
            args = self._args_class(output_dir=_DEFAULT_OUTPUT_DIR)
        self.args = adoption.adopt(args, self._args_class)
        preparation.seed(self.args)
        self._memory_tracker = self._new_memory_tracker()
        self._memory_tracker.start()
        self._set_up_logs()
        self.is_in_train = False
        self.model_init = model_init
        self._check_model_source(model)
        self._set_up_engine(model, engine)
        if self._plan is not None and self._plan.kind == "script":
            rank_logging.set_up_for_script(self.args.ranks)
        self._adopt_model(self.call_model_init() if model is None else model)
        if data_collator is None:
            data_collator = _default_collator(processing_class)
        self.data_collator = data_collator
        self.train_dataset, self.eval_dataset = train_dataset, eval_dataset
        self.processing_class = processing_class
        self.compute_loss_func = compute_loss_func
        self.compute_metrics = compute_metrics
        self.preprocess_logits_for_metrics = preprocess_logits_for_metrics
        self.optimizer, self.lr_scheduler = optimizers
        self.optimizer_cls_and_kwargs = optimizer_cls_and_kwargs
        self.label_smoother = self._make_label_smoother()
        self.neftune_noise_alpha = self.args.neftune_noise_alpha
        self._validate_args()
        self._check_metric_name(is_overridden=bool(callbacks) or self._evaluates_otherwise())
        self._set_up_callbacks(callbacks)
        self._make_output_dir()
        self._open_repository()
        self._start_without_training()
        self._fire("on_init_end")
        self._memory_tracker.stop_and_update_metrics()

    def _start_without_training(self) -> None:
        self.control = TrainerControl()
        self.state = self._new_state()
        self.state.is_local_process_zero = self.is_local_process_zero()
        self.state.is_world_process_zero = self.is_world_process_zero()
        self.hp_name = self.hp_search_backend = self._trial = None
        self.current_flos = 0.0
        self._train_batch_size = self.args.train_batch_size
        self._eval_dataloaders = {}

    def _check_model_source(self, model: nn.Module | None) -> None:
        if model is None and self.model_init is None:
            raise RuntimeError("`Trainer` requires either a `model` or `model_init` argument")
        if model is not None and self.model_init is not None:
            raise ValueError(
                "`Trainer` requires either a `model` or `model_init` argument, but not both."
            )
        if model is not None:
            introspection.check_is_module(model, source="model")

    def _make_label_smoother(self) -> LabelSmoother | None:
        factor = self.args.label_smoothing_factor
        if factor == 0:
            return None
        config = getattr(self.model, "config", None)
        if getattr(config, "problem_type", None) == "multi_label_classification":
            warnings.warn(
                "Label smoothing is not compatible with multi-label classification. Disabling "
                "label smoothing for this training run.",
                UserWarning,
                stacklevel=3,
            )
            return None
        return LabelSmoother(epsilon=factor)

    def _validate_args(self) -> None:
        """Refuse now what could only fail later."""
        self._tell_overrides_without_effect()
        self._check_metrics()
        self._check_optimizers()
        self._check_datasets()
        self._check_saving()
        args = self.args
        for name in ("fp16_full_eval", "bf16_full_eval", "jit_mode_eval", "torch_compile"):
            if self.engine.is_sharded and getattr(args, name):
                raise UnsupportedError(
                    f"{name} is not supported on engine {self.engine.name}, where no rank has the "
                    "whole model; leave it out, or use engine single or ddp"
                )
        if args.use_ipex:
            raise UnsupportedError(
                "use_ipex: bigtrain does not drive Intel's extension; leave it out, and use bf16: "
                "true: PyTorch has Intel's kernels itself"
            )

    def _tell_overrides_without_effect(self) -> None:
        """A method of transformers' Trainer that this loop has no call for would be overridden in
        vain."""
        mine = type(self)
        vain = [
            name
            for name in vars(theirs.Trainer)
            if hasattr(mine, name) and not hasattr(Trainer, name)
        ]
        if vain:
            warnings.warn(
                f"{mine.__name__} overrides {', '.join(vain)}, which bigtrain's loop never calls; "
                "docs/arguments.md lists the methods that it does",
                UserWarning,
                stacklevel=4,
            )

    def _check_metrics(self) -> None:
        args = self.args
        if (
            args.batch_eval_metrics
            and self.compute_metrics is not None
            and "compute_result" not in inspect.signature(self.compute_metrics).parameters
        ):
            raise ValueError(
                "When using `batch_eval_metrics`, your `compute_metrics` function must take a "
                "`compute_result` boolean argument which will be triggered after the last "
                "batch of the eval set to signal that the summary statistics should be "
                "returned by the function."
            )
        if args.eval_strategy != "no" and self.eval_dataset is None:
            raise ValueError(
                f"You have set `args.eval_strategy` to {args.eval_strategy} but you didn't pass "
                "an `eval_dataset` to `Trainer`. Either set `args.eval_strategy` to `no` or pass "
                "an `eval_dataset`. "
            )
        needs_metric = args.save_strategy == SaveStrategy.BEST or args.load_best_model_at_end
        if needs_metric and args.metric_for_best_model is None:
            raise ValueError(
                "`args.metric_for_best_model` must be provided when using 'best' save_strategy or "
                "if `args.load_best_model_at_end` is set to `True`."
            )

    def _evaluates_otherwise(self) -> bool:
        """Whether a subclass may add metrics of its own."""
        names = ("evaluate", "_evaluate", "evaluation_loop", "prediction_loop", "log")
        return any(
            getattr(type(self), name, None) is not getattr(Trainer, name, None) for name in names
        )

    def _check_optimizers(self) -> None:
        if self.optimizer_cls_and_kwargs is not None and self.optimizer is not None:
            raise RuntimeError(
                "Passing both `optimizers` and `optimizer_cls_and_kwargs` arguments is "
                "incompatible."
            )
        given = self.optimizer is not None or self.lr_scheduler is not None
        if self.model_init is not None and given:
            raise RuntimeError(
                "Passing a `model_init` is incompatible with providing the `optimizers` argument. "
                "You should subclass `Trainer` and override the `create_optimizer_and_scheduler` "
                "method."
            )

    def _check_datasets(self) -> None:
        if not callable(self.data_collator):
            raise TypeError(
                "The `data_collator` should be a simple callable (function, class with `__call__`)."
            )
        dataset = self.train_dataset
        if dataset is not None and not has_length(dataset) and self.args.max_steps <= 0:
            raise ValueError(
                "The train_dataset does not implement __len__, so the number of training steps "
                "cannot be inferred; max_steps has to be specified. The total number of steps "
                "must be known in advance to bound the training loop and to configure the "
                "learning rate scheduler."
            )


def _default_collator(processing_class: Any) -> Callable[..., Any]:
    pads = isinstance(processing_class, (PreTrainedTokenizerBase, SequenceFeatureExtractor))
    collator: Callable[..., Any] = (
        DataCollatorWithPadding(processing_class) if pads else default_data_collator
    )
    return collator
