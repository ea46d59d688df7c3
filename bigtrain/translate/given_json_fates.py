"""What becomes of every key that a DeepSpeed JSON may have. A key that is not here fails a test.

A key becomes an option or an argument, can have but few values here, has no effect, or is passed
on to DeepSpeed as it stands.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

_ZERO = "zero_optimization"
_DEVICES: Mapping[str, str | None] = {"none": None, "cpu": "cpu", "nvme": "nvme"}
_REDUCED_IN: Mapping[str, str] = {"fp32": "fp32", "bf16": "bf16", "fp16": "fp16"}
_MASTERS: Mapping[bool, str] = {True: "bf16", False: "fp32"}
DTYPES: Mapping[str, str] = {
    **dict.fromkeys(("fp32", "float32", "float", "torch.float32"), "fp32"),
    **dict.fromkeys(("bf16", "bfloat16", "torch.bfloat16"), "bf16"),
    **dict.fromkeys(("fp16", "float16", "half", "torch.float16"), "fp16"),
}
"""DeepSpeed's spellings of a precision (`DtypeEnum` in its runtime/config.py) → ours."""


def itself(value: Any) -> Any:
    """The value as it stands."""
    return value


OPTIONS: Mapping[str, tuple[str, Mapping[Any, Any] | Callable[[Any], Any]]] = {
    "communication_data_type": ("reduce_dtype", _REDUCED_IN),
    "bf16.bf16_master_weights_and_grads": ("master_dtype", _MASTERS),
    f"{_ZERO}.offload_optimizer.device": ("offload_optimizer", _DEVICES),
    f"{_ZERO}.offload_param.device": ("offload_parameters", _DEVICES),
    f"{_ZERO}.offload_optimizer.nvme_path": ("nvme_path", itself),
    f"{_ZERO}.offload_param.nvme_path": ("nvme_path", itself),
    f"{_ZERO}.zero_hpz_partition_size": ("secondary_shard", int),
    f"{_ZERO}.zero_quantized_weights": ("quantized_weights", itself),
    f"{_ZERO}.zero_quantized_gradients": ("quantized_gradients", itself),
}
"""Key → the option, and its values there → ours."""
ARGUMENTS: Mapping[str, str] = {
    "train_micro_batch_size_per_gpu": "per_device_train_batch_size",
    "gradient_accumulation_steps": "gradient_accumulation_steps",
    "gradient_clipping": "max_grad_norm",
    "bf16.enabled": "bf16",
    "fp16.enabled": "fp16",
    "optimizer.params.lr": "learning_rate",
    "optimizer.params.eps": "adam_epsilon",
    "optimizer.params.weight_decay": "weight_decay",
}
"""Key → the TrainingArguments field that says the same."""

_RECOMPUTED = (
    "only a model that calls deepspeed.checkpointing itself reads it; leave it out, and recompute "
    "by training.gradient_checkpointing"
)
_ONLY_DATA_PARALLEL = "only data parallelism is supported; leave it out"
_OUR_DATA = "the loop loads the data itself; leave it out"
_OUR_OPTIMIZER = "the loop hands in a torch optimizer; leave it out"
_OUR_STATE = "checkpoints here do not know it; leave it out"
_A_PRECISION = "DeepSpeed takes fp32, bf16 or fp16; use one of them, or leave it out"
ONLY: Mapping[str, tuple[tuple[Any, ...], str]] = {
    "activation_checkpointing.partition_activations": ((False,), _RECOMPUTED),
    "activation_checkpointing.cpu_checkpointing": ((False,), _RECOMPUTED),
    "activation_checkpointing.contiguous_memory_optimization": ((False,), _RECOMPUTED),
    "activation_checkpointing.number_checkpoints": ((), _RECOMPUTED),
    "fp16.fp16_master_weights_and_grads": ((False,), "masters are fp32 here; leave it out"),
    "zero_allow_untested_optimizer": ((True,), _OUR_OPTIMIZER),
    "zero_force_ds_cpu_optimizer": ((False,), _OUR_OPTIMIZER),
    "managed_gradient_accumulation": (
        (True,),
        "the loop says where accumulation ends; leave it out",
    ),
    "gradient_allreduce_op": (
        ("mean",),
        "the loop divides the loss by the items of all ranks, and takes the mean of gradients for "
        "granted; leave it out",
    ),
    "data_efficiency.enabled": ((False,), _OUR_DATA),
    "data_efficiency.data_sampling.enabled": ((False,), _OUR_DATA),
    "data_efficiency.data_routing.enabled": ((False,), "the loop never drops tokens; leave it out"),
    "hybrid_engine.enabled": ((False,), "it is DeepSpeed's for generation; leave it out"),
    "autotuning.enabled": (
        (False,),
        "DeepSpeed's own launcher tunes, not a training; leave it out, and see bigtrain plan "
        "--compare",
    ),
    "compile.deepcompile": ((False,), "the loop never calls engine.compile; leave it out"),
    "torch_autocast.enabled": (
        (False,),
        "training.bf16 and fp16 say what computes in which precision; leave it out",
    ),
    "torch_autocast.dtype": (tuple(DTYPES), _A_PRECISION),
    "data_types.param_dtype": ((), "training.bf16 and fp16 say that; leave it out"),
    "data_types.grad_accum_dtype": (tuple(DTYPES), _A_PRECISION),
    "data_types.buffer_dtype": (tuple(DTYPES), _A_PRECISION),
    "seq_parallel_communication_data_type": (tuple(_REDUCED_IN), _A_PRECISION),
    "checkpoint.tag_validation": (
        ("warn", "ignore", "fail"),
        "DeepSpeed takes Warn, Ignore or Fail; leave it out",
    ),
    "datastates_ckpt": ((), "checkpoints are written by bigtrain; leave it out"),
    "weight_quantization": ((), "it is for inference; leave it out"),
    f"{_ZERO}.zenflow": ((), _OUR_STATE),
    f"{_ZERO}.offload_optimizer.super_offload": ((False,), _OUR_STATE),
    f"{_ZERO}.zero_quantized_nontrainable_weights": ((False,), _OUR_STATE),
    f"{_ZERO}.elastic_checkpoint": ((False,), _OUR_STATE),
    f"{_ZERO}.legacy_stage1": ((False,), "DeepSpeed has it no more; leave it out"),
    "tensor_parallel": (({},), _ONLY_DATA_PARALLEL),
    "pipeline": (({},), _ONLY_DATA_PARALLEL),
    "expert_parallel": (({},), _ONLY_DATA_PARALLEL),
    "sequence_parallel_size": ((1,), _ONLY_DATA_PARALLEL),
    "bfloat16": ((), "it is an older name; say bf16"),
    f"{_ZERO}.cpu_offload": ((), 'it is an older name; say offload_optimizer: {"device": "cpu"}'),
    f"{_ZERO}.cpu_offload_param": ((), 'it is an older name; say offload_param: {"device": "cpu"}'),
    f"{_ZERO}.cpu_offload_use_pin_memory": (
        (),
        "it is an older name; say offload_optimizer.pin_memory",
    ),
}
"""Key → the only values that it can have here (texts in lower case), and why."""
_SAVED_BY_US = "checkpoints are written by bigtrain"
_NOT_ENABLED = "it is not enabled"
_GATHERED_BY_US = "export goes tensor by tensor"
WITHOUT_EFFECT: Mapping[str, str] = {
    "checkpoint": _SAVED_BY_US,
    "dataloader_drop_last": "training.dataloader_drop_last says it",
    "data_efficiency": _NOT_ENABLED,
    "hybrid_engine": _NOT_ENABLED,
    "autotuning": _NOT_ENABLED,
    "torch_autocast": _NOT_ENABLED,
    "compile": "the loop never calls engine.compile",
    "optimizer": "the loop makes it, by the same values",
    "scheduler": "the loop makes it",
    f"{_ZERO}.load_from_fp32_weights": _SAVED_BY_US,
    f"{_ZERO}.pipeline_loading_checkpoint": _SAVED_BY_US,
    f"{_ZERO}.stage3_gather_16bit_weights_on_model_save": _GATHERED_BY_US,
    f"{_ZERO}.stage3_gather_fp16_weights_on_model_save": _GATHERED_BY_US,
    f"{_ZERO}.gather_16bit_weights_on_model_save": _GATHERED_BY_US,
}
"""Key → why nothing comes of it in a run file."""
PASSED_ON = frozenset(
    {
        *("activation_checkpointing", "aio", "comms_logger", "flops_profiler", "timers"),
        *("comet", "csv_monitor", "tensorboard", "wandb"),
        *("allgather_size", "disable_allgather", "disable_python_gc", "dump_state", "log_level"),
        *("gradient_predivide_factor", "memory_breakdown", "prescale_gradients"),
        *("steps_per_print", "train_batch_size", "use_data_before_expert_parallelism"),
        *("vocabulary_size", "wall_clock_breakdown"),
        *("bf16.bf16_optimizer_states", "bf16.check_grad_overflow", "bf16.immediate_grad_update"),
        *("fp16.auto_cast", "fp16.consecutive_hysteresis", "fp16.hysteresis"),
        *("fp16.initial_scale_power", "fp16.loss_scale", "fp16.loss_scale_window"),
        *("fp16.min_loss_scale", "data_types.keep_in_fp32_modules"),
        *(
            f"{_ZERO}.{key}"
            for key in (
                *("stage", "allgather_bucket_size", "allgather_partitions", "compute_grad_norm"),
                *("contiguous_gradients", "enable_sanity_checks", "ignore_unused_parameters"),
                *("leaf_module", "log_trace_cache_warnings", "memory_efficient_linear"),
                *("overlap_comm", "override_module_apply", "parameter_alignment"),
                *("reduce_bucket_size", "reduce_scatter", "round_robin_gradients"),
                *("save_muon_momentum_buffer_in_memory", "sub_group_size"),
                "use_multi_rank_bucket_allreduce",
            )
        ),
        *(
            f"{_ZERO}.{prefix}{key}"
            for prefix in ("", "stage3_")
            for key in (
                *("allgather_sequential", "max_live_parameters", "max_reuse_distance"),
                *("model_persistence_threshold", "module_granularity_threshold"),
                *("param_persistence_threshold", "prefetch_bucket_size"),
                "use_all_reduce_for_fetch_params",
            )
        ),
        *(
            f"{_ZERO}.offload_param.{key}"
            for key in ("buffer_count", "buffer_size", "max_in_cpu", "pin_memory")
        ),
        *(
            f"{_ZERO}.offload_optimizer.{key}"
            for key in (
                *("buffer_count", "cpuadam_cores_perc", "fast_init", "pin_memory"),
                *("pipeline_read", "pipeline_write", "ratio"),
            )
        ),
    }
)
"""What DeepSpeed is told as it stands: a key, or a section with all that is in it."""
_ALL = frozenset({*OPTIONS, *ARGUMENTS, *ONLY, *WITHOUT_EFFECT, *PASSED_ON})


def is_judged(key: str) -> bool:
    """Whether it is known here what becomes of the key, or of what is in that section."""
    return any(
        key == known or key.startswith(f"{known}.") or known.startswith(f"{key}.") for known in _ALL
    )
