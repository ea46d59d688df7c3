"""What becomes of every TrainingArguments field. A field that is not here fails a test.

A rule is what holds on every engine. Where an engine's own config takes the value, the engine's
translator answers with `mapped` instead, and then its answer stands.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any, Literal, TypeAlias

from bigtrain.arguments.schema import Schema

FateName: TypeAlias = Literal["mapped", "derived", "loop", "no_effect", "refused"]


@dataclass(frozen=True, kw_only=True)
class Rule:
    """The fate of one field, and in a few words by what, from what, or why."""

    fate: FateName
    detail: str


def _loop(detail: str) -> Rule:
    return Rule(fate="loop", detail=detail)


def _derived(detail: str) -> Rule:
    return Rule(fate="derived", detail=detail)


def _no_effect(detail: str) -> Rule:
    return Rule(fate="no_effect", detail=detail)


def _refused(detail: str) -> Rule:
    return Rule(fate="refused", detail=detail)


_OPTIMIZER = _loop("a hyperparameter of the optimizer")
_SCHEDULE = _loop("the learning rate's schedule")
_BATCHES = _loop("the data loaders")
_CADENCE_LOG = _loop("when the loop logs")
_CADENCE_EVAL = _loop("when the loop evaluates")
_CADENCE_SAVE = _loop("when the loop saves")
_EVALUATION = _loop("how evaluation runs")
_BEST = _loop("which checkpoint is the best")
_REPORTING = _loop("transformers' reporting callbacks")
_MODEL_PATCH = _loop("applied to the model before the engine takes it")
_HUB = _loop("what push_to_hub uploads, and where to")
_DDP_ONLY = _no_effect("only ddp reads it")

FATES: Mapping[str, Rule] = {
    # Where things go
    "output_dir": _loop("checkpoints, logs and the plan go there"),
    "overwrite_output_dir": _loop("continue in a directory that is in use; nothing is deleted"),
    "resume_from_checkpoint": _loop("where training continues from"),
    # How much
    "per_device_train_batch_size": _loop("the micro-batch of each process"),
    "per_device_eval_batch_size": _EVALUATION,
    "num_train_epochs": _loop("how long the loop runs"),
    "max_steps": _loop("how long the loop runs; wins over num_train_epochs"),
    "gradient_accumulation_steps": _loop("micro-batches in one window"),
    "average_tokens_across_devices": _loop("what the loss is divided by"),
    "auto_find_batch_size": _loop(
        "starts over with a micro-batch a tenth smaller when memory runs out"
    ),
    # Optimizer and schedule
    "learning_rate": _OPTIMIZER,
    "weight_decay": _OPTIMIZER,
    "adam_beta1": _OPTIMIZER,
    "adam_beta2": _OPTIMIZER,
    "adam_epsilon": _OPTIMIZER,
    "optim": _loop("which optimizer is made"),
    "optim_args": _OPTIMIZER,
    "optim_target_modules": _OPTIMIZER,
    "lr_scheduler_type": _SCHEDULE,
    "lr_scheduler_kwargs": _SCHEDULE,
    "warmup_steps": _SCHEDULE,
    "warmup_ratio": _SCHEDULE,
    "max_grad_norm": _loop("the norm over all shards that `engine.step` clips to"),
    "label_smoothing_factor": _loop("the loss"),
    "neftune_noise_alpha": _MODEL_PATCH,
    # Precision
    "bf16": _derived("the engine's compute precision"),
    "fp16": _derived("the engine's compute precision"),
    "fp16_opt_level": _derived("which parts of fp16 training are in fp16"),
    "fp16_backend": _no_effect("removed upstream: PyTorch's own mixed precision is the only one"),
    "bf16_full_eval": _EVALUATION,
    "fp16_full_eval": _EVALUATION,
    "tf32": _loop("switched on or off in PyTorch's GPU backends"),
    "use_cpu": _derived("the device of the run"),
    "use_ipex": _refused(
        "bigtrain does not drive Intel's extension; leave it out and use bf16: true, for which "
        "PyTorch has Intel's kernels itself"
    ),
    # Memory and speed
    "activation_checkpointing": _MODEL_PATCH,
    "activation_checkpointing_kwargs": _MODEL_PATCH,
    "gradient_checkpointing": _MODEL_PATCH,
    "gradient_checkpointing_kwargs": _MODEL_PATCH,
    "torch_compile": _MODEL_PATCH,
    "torch_compile_backend": _MODEL_PATCH,
    "torch_compile_mode": _MODEL_PATCH,
    "use_liger_kernel": _MODEL_PATCH,
    "liger_kernel_config": _MODEL_PATCH,
    "use_cache": _MODEL_PATCH,
    "torch_empty_cache_steps": _loop("when the device cache is emptied, on all ranks at once"),
    # Logging
    "logging_dir": _REPORTING,
    "logging_strategy": _CADENCE_LOG,
    "logging_steps": _CADENCE_LOG,
    "logging_first_step": _CADENCE_LOG,
    "log_on_each_node": _loop("which processes log"),
    "logging_nan_inf_filter": _loop("the logged mean of the loss"),
    "include_num_input_tokens_seen": _loop("the count of tokens in the trainer's state"),
    "log_level": _loop("the main process's log level"),
    "log_level_replica": _loop("the other processes' log level"),
    "disable_tqdm": _loop("the progress bar of a run without bigtrain's launcher"),
    "report_to": _REPORTING,
    "run_name": _REPORTING,
    "project": _REPORTING,
    "trackio_space_id": _REPORTING,
    "trackio_bucket_id": _REPORTING,
    "trackio_static_space_id": _REPORTING,
    "skip_memory_metrics": _loop("whether memory metrics go into the log"),
    "debug": _loop("underflow and overflow detection"),
    # Evaluation
    "eval_strategy": _CADENCE_EVAL,
    "eval_steps": _CADENCE_EVAL,
    "eval_delay": _CADENCE_EVAL,
    "eval_on_start": _CADENCE_EVAL,
    "prediction_loss_only": _EVALUATION,
    "eval_do_concat_batches": _EVALUATION,
    "eval_use_gather_object": _EVALUATION,
    "eval_accumulation_steps": _EVALUATION,
    "include_for_metrics": _EVALUATION,
    "batch_eval_metrics": _EVALUATION,
    "jit_mode_eval": _EVALUATION,
    # Saving
    "save_strategy": _CADENCE_SAVE,
    "save_steps": _CADENCE_SAVE,
    "save_total_limit": _loop("how many checkpoints are kept"),
    "save_only_model": _loop("what a checkpoint holds"),
    "async_save": _loop("whether training waits until a checkpoint is on the disk"),
    "on_save_failure": _loop("whether training goes on without a checkpoint"),
    "export": _loop("which steps become a model for from_pretrained"),
    "export_interval": _loop("which steps become a model for from_pretrained"),
    "reset_optimizer": _loop("what of a checkpoint training goes on from"),
    "save_safetensors": _loop("the format of exported weights"),
    "save_on_each_node": _loop("which processes write"),
    "enable_jit_checkpoint": _loop("saving on SIGTERM"),
    "load_best_model_at_end": _BEST,
    "metric_for_best_model": _BEST,
    "greater_is_better": _BEST,
    "ignore_data_skip": _loop("where the data goes on after a resume"),
    "restore_callback_states_from_checkpoint": _loop("what a resume restores"),
    "push_to_hub": _loop("the main process uploads by huggingface_hub; sharded weights at the end"),
    "hub_token": _HUB,
    "hub_private_repo": _HUB,
    "hub_model_id": _HUB,
    "hub_strategy": _HUB,
    "hub_always_push": _HUB,
    "hub_revision": _HUB,
    # Randomness and data
    "full_determinism": _loop("seeds and deterministic kernels"),
    "seed": _loop("seeds every process before training"),
    "data_seed": _loop("seeds the sampler"),
    "dataloader_drop_last": _BATCHES,
    "dataloader_num_workers": _BATCHES,
    "dataloader_pin_memory": _BATCHES,
    "dataloader_persistent_workers": _BATCHES,
    "dataloader_prefetch_factor": _BATCHES,
    "dataloader_multiprocessing_context": _BATCHES,
    "dataloader_in_order": _BATCHES,
    "remove_unused_columns": _BATCHES,
    "label_names": _loop("which inputs are labels"),
    "train_sampling_strategy": _BATCHES,
    "length_column_name": _BATCHES,
    # Engines and processes
    "ddp_find_unused_parameters": _DDP_ONLY,
    "ddp_bucket_cap_mb": _DDP_ONLY,
    "ddp_broadcast_buffers": _DDP_ONLY,
    "ddp_static_graph": _DDP_ONLY,
    "ddp_backend": _derived("the device of the run: gloo on CPUs, nccl on GPUs"),
    "ddp_timeout": _loop("how long a collective may wait"),
    "fsdp": _derived("which engine runs"),
    "fsdp_config": _derived("the engine's options"),
    "deepspeed": _derived("which engine runs, and its options"),
    "accelerator_config": _loop("how batches are shared out to the processes"),
    "parallelism_config": _refused("only data parallelism is supported; leave it out"),
    "local_rank": _no_effect("the launcher says which process this is"),
    # Left to scripts
    "do_train": _loop("whether a run file trains (true unless it says false); a script reads it"),
    "do_eval": _loop(
        "whether a run file evaluates at its end (true where it has something to evaluate on); "
        "a script reads it"
    ),
    "do_predict": _loop(
        "refused in a run file, which names nothing to predict on; a script reads it"
    ),
}


def refusals(values: Mapping[str, Any], schema: Schema) -> Iterator[tuple[str, str]]:
    """(field, why) for all that no engine supports: fields without a fate among them.

    Only values that differ from their default count: a default asks for nothing.
    """
    for name, value in values.items():
        if name not in schema:
            yield name, "TrainingArguments has no such field"
        elif is_default(value, schema[name].default):
            continue
        elif name not in FATES:
            yield name, "this version of transformers has it and bigtrain does not know it yet"
        elif FATES[name].fate == "refused":
            yield name, FATES[name].detail


def is_default(value: Any, default: Any) -> bool:
    """True when `value` asks for nothing beyond `default`.

    Values also come from a live TrainingArguments, which turns strings into enums, "none" and ""
    into empty lists, and None into an object with defaults of its own.
    """
    if isinstance(value, Enum):
        value = value.value
    if value is None or value == default:
        return True
    if value == [] and default in (None, "", "none"):
        return True
    if default is None and dataclasses.is_dataclass(value) and not isinstance(value, type):
        return bool(value == type(value)())
    return False
