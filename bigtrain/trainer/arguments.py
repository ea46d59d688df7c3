"""TrainingArguments: transformers' own, the arguments it has dropped, and bigtrain's processes.

Which process this is comes from `RankInfo`, not from accelerate's `PartialState`: making arguments
joins no process group. The fields below are read without an import by `bigtrain.arguments`, so
their defaults are literals.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from accelerate.state import PartialState
from transformers.training_args import ParallelMode
from transformers.utils import logging

from bigtrain.device import choose_device
from bigtrain.errors import UnsupportedError
from bigtrain.paths import expand_home
from bigtrain.topology import RankInfo
from bigtrain.trainer import environment, plugins

logger = logging.get_logger(__name__)

FP16_OPT_LEVELS = ("O0", "O1", "O2", "O3")
_OF_THIS_PROCESS = (
    "_ranks",
    "_setup_devices",
    "_n_gpu",
    "hf_deepspeed_config",
    "deepspeed_plugin",
)


@dataclass(repr=False)
class TrainingArguments(transformers.TrainingArguments):  # type: ignore[misc]
    """`transformers.TrainingArguments`, with the fields that transformers 5 no longer has."""

    overwrite_output_dir: bool = field(
        default=False,
        metadata={
            "help": "Continue in an output_dir that is in use: a checkpoint in it is resumed from "
            "unless resume_from_checkpoint=False. Nothing is deleted."
        },
    )
    warmup_ratio: float = field(
        default=0.0,
        metadata={
            "help": "Share of all steps over which the learning rate rises. `warmup_steps` wins; "
            "0 is unset."
        },
    )
    logging_dir: str | None = field(
        default=None,
        metadata={"help": "TensorBoard's directory. Default: a new one in output_dir/runs."},
    )
    save_safetensors: bool = field(
        default=True,
        metadata={
            "help": "Save weights as safetensors; false: as torch.save does (pytorch_model.bin)."
        },
    )
    async_save: bool | None = field(
        default=None,
        metadata={
            "help": "Write checkpoints in the background: training waits only until its state is "
            "copied to memory, and on_save comes some steps later. Default: under bigtrain's "
            "launcher."
        },
    )
    on_save_failure: str = field(
        default="stop",
        metadata={
            "help": "When a checkpoint can't be saved: stop training, or continue without it.",
            "choices": ["stop", "continue"],
        },
    )
    export: str = field(
        default="last",
        metadata={
            "help": "What becomes a model for from_pretrained: the last step, as output_dir; every "
            "checkpoint too, as its model/, in the background; or never (under bigtrain launch).",
            "choices": ["last", "every", "never"],
        },
    )
    export_interval: int = field(
        default=1,
        metadata={"help": "With export: every, only every so many checkpoints."},
    )
    reset_optimizer: bool = field(
        default=False,
        metadata={
            "help": "Resume weights, schedule and place in the data, and start with a new "
            "optimizer."
        },
    )
    jit_mode_eval: bool = field(
        default=False,
        metadata={"help": "Evaluate through torch.jit.trace where the model can be traced."},
    )
    use_ipex: bool = field(
        default=False,
        metadata={"help": "Use Intel's extension for PyTorch; refused where it is not installed."},
    )
    fp16_opt_level: str = field(
        default="O1",
        metadata={
            "help": "With fp16: O0 full precision, O1 autocast, O2 fp16 weights with fp32 masters, "
            "O3 fp16 throughout.",
            "choices": ["O0", "O1", "O2", "O3"],
        },
    )
    fp16_backend: str = field(
        default="auto",
        metadata={"help": "Removed upstream: accepted, warned about once, without effect."},
    )

    def __post_init__(self) -> None:
        if self.eval_strategy == "epochs":
            self.eval_strategy = "epoch"
        self.settle()
        # transformers would make accelerate's DeepSpeed plugin of it and from then on build every
        # model under `zero.Init`; here the engine shards the model.
        deepspeed, self.deepspeed = self.deepspeed, None
        super().__post_init__()
        if isinstance(deepspeed, str) and deepspeed.startswith("{"):
            deepspeed = json.loads(deepspeed)
        self.deepspeed = deepspeed
        self.__dict__.pop("deepspeed_plugin", None)
        self._check_configured_state()
        if self.logging_dir is not None:
            self.logging_dir = str(expand_home(self.logging_dir, label="logging_dir"))

    def settle(self) -> None:
        """What this class adds to transformers' own: the plan's word, and checks of its fields."""
        self._follow_output_dir()
        self._check_own_fields()

    def _follow_output_dir(self) -> None:
        """`bigtrain launch script.py --output-dir DIR` wins over what the script says."""
        plan = environment.plan()
        if plan is None or plan.kind != "script" or "output_dir" not in plan.origins:
            return
        said = self.output_dir
        if said is not None and expand_home(said).absolute() != Path(plan.output_dir):
            origin = plan.origins["output_dir"]
            logger.warning_once(
                f"output_dir is {plan.output_dir} ({origin}), not {said} as the script says"
            )
        self.output_dir = plan.output_dir

    def _check_own_fields(self) -> None:
        level = self.fp16_opt_level
        if level not in FP16_OPT_LEVELS:
            raise ValueError(f"fp16_opt_level is {level!r}; use {', '.join(FP16_OPT_LEVELS)}")
        if self.on_save_failure not in ("stop", "continue"):
            raise ValueError(f"on_save_failure is {self.on_save_failure!r}; use stop or continue")
        if self.export not in ("last", "every", "never"):
            raise ValueError(f"export is {self.export!r}; use last, every or never")
        if self.export_interval < 1:
            raise ValueError(f"export_interval is {self.export_interval}; it must be at least 1")
        self._check_batches()
        if not 0 <= self.warmup_ratio <= 1:
            raise ValueError(f"warmup_ratio must lie in range [0,1], it is {self.warmup_ratio}")
        if self.fp16_backend != "auto":
            warnings.warn(
                f"fp16_backend={self.fp16_backend!r} has no effect: PyTorch's own is used",
                FutureWarning,
                stacklevel=3,
            )
        if self.use_ipex and importlib.util.find_spec("intel_extension_for_pytorch") is None:
            raise UnsupportedError(
                "use_ipex is set but intel_extension_for_pytorch is not installed; leave it out: "
                "PyTorch has Intel's kernels itself (on a CPU, bf16: true is what makes it fast)"
            )

    def _check_batches(self) -> None:
        """By name, what ends in a division by zero or in the middle of a DataLoader."""
        if self.gradient_accumulation_steps == 0:
            raise ValueError("gradient_accumulation_steps is 0; it must be at least 1")
        evaluates = self.eval_strategy != "no" or self.eval_on_start
        used = (
            "per_device_train_batch_size",
            *(("per_device_eval_batch_size",) if evaluates else ()),
        )
        for name in used:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")

    def _validate_args(self) -> None:
        # transformers takes "no GPU" for a mistake unless use_cpu says it; here a machine without
        # a GPU trains in bf16 on its CPU.
        chosen = self.use_cpu
        self.use_cpu = chosen or self.device.type == "cpu"
        try:
            super()._validate_args()
        finally:
            self.use_cpu = chosen

    def _check_configured_state(self) -> None:
        """`use_configured_state` says that the script has made accelerate's state: it stays as it
        is, for bigtrain makes and resets none."""
        config: Any = self.accelerator_config
        if getattr(config, "use_configured_state", False) and not PartialState._shared_state:
            raise ValueError(
                "Passing `'use_configured_state':True` to the AcceleratorConfig requires a "
                "pre-configured `AcceleratorState` or `PartialState` to be defined before calling "
                "`TrainingArguments`. "
            )

    @cached_property
    def hf_deepspeed_config(self) -> Any:  # type: ignore[override]  # theirs is a plain attribute
        """`deepspeed` with its "auto" values resolved, for scripts that ask; no engine reads it."""
        if not self.deepspeed:
            raise AttributeError("hf_deepspeed_config: these arguments have no `deepspeed`")
        return plugins.resolved_deepspeed(self.deepspeed, self)

    @cached_property
    def deepspeed_plugin(self) -> Any:  # type: ignore[override]
        """What scripts ask accelerate's plugin for; None without `deepspeed`."""
        return plugins.deepspeed_of(self.hf_deepspeed_config) if self.deepspeed else None

    @property
    def ranks(self) -> RankInfo:
        """Which process of the run this is."""
        self._setup_devices  # noqa: B018 (the property reads the place once, with the device)
        return self._ranks

    @cached_property
    def _setup_devices(self) -> torch.device:
        self._ranks: RankInfo = environment.ranks()
        self.distributed_state = None
        plan = environment.plan()
        kind = "cuda" if torch.cuda.is_available() else "cpu"
        kind = plan.device if plan is not None else kind
        device = choose_device("cpu" if self.use_cpu else kind, world=self._ranks)
        self._n_gpu = 0 if device.type == "cpu" else 1
        return device

    @property
    def n_gpu(self) -> int:
        """GPUs of this process: one or none. Several GPUs are several processes."""
        self._setup_devices  # noqa: B018
        return self._n_gpu

    @property
    def parallel_mode(self) -> ParallelMode:
        return ParallelMode.DISTRIBUTED if self.world_size > 1 else ParallelMode.NOT_PARALLEL

    @property
    def world_size(self) -> int:
        return self.ranks.world_size

    @property
    def process_index(self) -> int:
        return self.ranks.rank

    @property
    def local_process_index(self) -> int:
        return self.ranks.local_rank

    @property
    def should_log(self) -> bool:
        return self.ranks.is_local_main if self.log_on_each_node else self.ranks.is_main

    @property
    def should_save(self) -> bool:
        return self.ranks.is_local_main if self.save_on_each_node else self.ranks.is_main

    @contextlib.contextmanager
    def main_process_first(self, local: bool = True, desc: str = "work") -> Iterator[None]:
        """The main process (of each node, or of all) does the work, then the others do.

        Before a process group exists there is nobody to wait for: everyone works at once.
        """
        if self.world_size == 1 or not dist.is_initialized():
            yield
            return
        is_first = self.ranks.is_local_main if local else self.ranks.is_main
        if not is_first:
            dist.barrier()
        try:
            yield
        finally:
            if is_first:
                dist.barrier()

    def get_warmup_steps(self, num_training_steps: int) -> int:
        if self.warmup_steps == 0:
            return math.ceil(num_training_steps * self.warmup_ratio)
        return int(super().get_warmup_steps(num_training_steps))

    def tensorboard_dir(self) -> Path | None:
        """Where TensorBoard's files go when it was said; None: where transformers puts them."""
        return Path(self.logging_dir) if self.logging_dir is not None else None

    def __getstate__(self) -> dict[str, Any]:
        # `training_args.bin` is opened on other machines: the place in this run stays out,
        # and so does a secret.
        state = dict(self.__dict__)
        for name in _OF_THIS_PROCESS:
            state.pop(name, None)
        state["hub_token"] = None
        return state
