"""A DeepSpeed JSON's keys that are engine options here, and those that can have but one value."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from bigtrain.translate.config import EngineOptions
from bigtrain.translate.given import GivenOption

_ZERO = "zero_optimization"
_DEVICES: Mapping[str, str | None] = {"none": None, "cpu": "cpu", "nvme": "nvme"}
_DTYPES: Mapping[str, str] = {"fp32": "fp32", "bf16": "bf16", "fp16": "fp16"}
_MASTERS: Mapping[bool, str] = {True: "bf16", False: "fp32"}


def _itself(value: Any) -> Any:
    return value


_OPTIONS: Mapping[str, tuple[str, Mapping[Any, Any] | Callable[[Any], Any]]] = {
    "communication_data_type": ("reduce_dtype", _DTYPES),
    "bf16.bf16_master_weights_and_grads": ("master_dtype", _MASTERS),
    f"{_ZERO}.offload_optimizer.device": ("offload_optimizer", _DEVICES),
    f"{_ZERO}.offload_param.device": ("offload_parameters", _DEVICES),
    f"{_ZERO}.offload_optimizer.nvme_path": ("nvme_path", _itself),
    f"{_ZERO}.offload_param.nvme_path": ("nvme_path", _itself),
    f"{_ZERO}.zero_hpz_partition_size": ("secondary_shard", int),
    f"{_ZERO}.zero_quantized_weights": ("quantized_weights", _itself),
    f"{_ZERO}.zero_quantized_gradients": ("quantized_gradients", _itself),
}
"""Key → the option, and its values there → ours."""

_RECOMPUTED = (
    "only a model that calls deepspeed.checkpointing itself reads it; leave it out, and recompute "
    "by training.gradient_checkpointing"
)
_OUR_DATA = "the loop loads the data itself; leave it out"
_OUR_STATE = "checkpoints here do not know it; leave it out"
_ONE_WAY: Mapping[str, tuple[Any, str]] = {
    "activation_checkpointing.partition_activations": (False, _RECOMPUTED),
    "activation_checkpointing.cpu_checkpointing": (False, _RECOMPUTED),
    "activation_checkpointing.contiguous_memory_optimization": (False, _RECOMPUTED),
    "activation_checkpointing.number_checkpoints": (None, _RECOMPUTED),
    "fp16.fp16_master_weights_and_grads": (False, "masters are fp32 here; leave it out"),
    "zero_allow_untested_optimizer": (True, "the loop hands in a torch optimizer; leave it out"),
    "zero_force_ds_cpu_optimizer": (False, "the loop hands in a torch optimizer; leave it out"),
    "managed_gradient_accumulation": (True, "the loop says where accumulation ends; leave it out"),
    "data_efficiency.enabled": (False, _OUR_DATA),
    "data_efficiency.data_sampling.enabled": (False, _OUR_DATA),
    "data_efficiency.data_routing.enabled": (False, "the loop never drops tokens; leave it out"),
    "hybrid_engine.enabled": (False, "it is DeepSpeed's for generation; leave it out"),
    "autotuning.enabled": (
        False,
        "DeepSpeed's own launcher tunes, not a training; leave it out, and see bigtrain plan "
        "--compare",
    ),
    "compile.deepcompile": (False, "the loop never calls engine.compile; leave it out"),
    "torch_autocast.enabled": (
        False,
        "training.bf16 and fp16 say what computes in which precision; leave it out",
    ),
    "data_types.param_dtype": (None, "training.bf16 and fp16 say that; leave it out"),
    "datastates_ckpt": (None, "checkpoints are written by bigtrain; leave it out"),
    "weight_quantization": (None, "it is for inference; leave it out"),
    f"{_ZERO}.zenflow": (None, _OUR_STATE),
    f"{_ZERO}.offload_optimizer.super_offload": (False, _OUR_STATE),
}
"""Key → the only value that it can have here, and why."""
_OLDER_NAMES: Mapping[str, str] = {
    "bfloat16": "bf16",
    f"{_ZERO}.cpu_offload": 'offload_optimizer: {"device": "cpu"}',
    f"{_ZERO}.cpu_offload_param": 'offload_param: {"device": "cpu"}',
    f"{_ZERO}.cpu_offload_use_pin_memory": "offload_optimizer.pin_memory",
}
_PARALLEL = ("tensor_parallel", "pipeline", "expert_parallel", "sequence_parallel_size")
WITHOUT_EFFECT: Mapping[str, str] = {
    "checkpoint": "checkpoints are written by bigtrain",
    "dataloader_drop_last": "training.dataloader_drop_last says it",
    "data_efficiency": "it is not enabled",
    "hybrid_engine": "it is not enabled",
    "autotuning": "it is not enabled",
    "optimizer": "the loop makes it, by the same values",
    "scheduler": "the loop makes it",
    f"{_ZERO}.stage3_gather_16bit_weights_on_model_save": "export goes tensor by tensor",
}
"""Key → why nothing comes of it in a run file."""


def options(given: Mapping[str, Any]) -> list[GivenOption]:
    """What it says of the engine."""
    found = []
    for key, (option, read) in _OPTIONS.items():
        spelled = leaf(given, key)
        if spelled is None or spelled == "auto" or (read is _itself and not _is_used(given, key)):
            continue
        known = not isinstance(read, Mapping) or spelled in read
        if known:
            value = read[spelled] if isinstance(read, Mapping) else read(spelled)
            found.append(
                GivenOption(option=option, value=value, field="deepspeed", key=key, spelled=spelled)
            )
    return found


def _is_used(given: Mapping[str, Any], key: str) -> bool:
    """A path is nobody's where the section's device is another than NVMe."""
    section, _, name = key.rpartition(".")
    return name != "nvme_path" or leaf(given, f"{section}.device") == "nvme"


def faults(given: Mapping[str, Any], options: EngineOptions) -> Iterator[str]:
    """What is wrong, and the fix, for values that can't be had. `options`: all that was said."""
    for key, (_, read) in _OPTIONS.items():
        spelled = leaf(given, key)
        if isinstance(read, Mapping) and spelled not in (None, "auto", *read):
            yield f"{key} is {spelled!r} there, not {_listed(read)}"
    for key, (only, why) in _ONE_WAY.items():
        spelled = leaf(given, key)
        if spelled not in (None, "auto", only):
            yield f"{key} is {_word(spelled)} there, but {why}"
    for key, newer in _OLDER_NAMES.items():
        if leaf(given, key) is not None:
            yield f"{key} is an older name; say {newer}"
    for key in _PARALLEL:
        if given.get(key) not in (None, {}, 1):
            yield f"{key}: only data parallelism is supported; leave it out"
    yield from _partial_offload_faults(given)
    yield from _precision_faults(given, options)


def _partial_offload_faults(given: Mapping[str, Any]) -> Iterator[str]:
    """As DeepSpeed's `offload_ratio_check` has it, which it makes when the job runs."""
    section = f"{_ZERO}.offload_optimizer"
    ratio, stage = leaf(given, f"{section}.ratio"), leaf(given, f"{_ZERO}.stage")
    is_offloaded = leaf(given, f"{section}.device") not in (None, "none")
    if is_offloaded and ratio not in (None, "auto") and ratio < 1 and stage != 3:
        yield (
            f"{section}.ratio is {ratio} there, but only stage 3 can offload a part, and the stage "
            f"is {stage or 0}; make it 1.0, or the stage 3"
        )


def without_effect(given: Mapping[str, Any]) -> Iterator[str]:
    """Each key from which nothing comes here, with the reason."""
    for key, why in WITHOUT_EFFECT.items():
        if leaf(given, key) is not None:
            yield f"{key} ({why})"


def _precision_faults(given: Mapping[str, Any], options: EngineOptions) -> Iterator[str]:
    """Gradients accumulate, and the optimizer keeps its state, in the masters' precision."""
    masters = options.master_dtype or "fp32"
    kept = leaf(given, "data_types.grad_accum_dtype")
    if kept not in (None, "auto", masters):
        yield (
            f"data_types.grad_accum_dtype is {kept} there, but gradients accumulate in the "
            f"masters' precision, {masters}; leave it out, or set engine.master_dtype"
        )
    states = leaf(given, "bf16.bf16_optimizer_states")
    if isinstance(states, bool) and states != (masters == "bf16"):
        yield (
            f"bf16.bf16_optimizer_states is {_word(states)} there, but the optimizer's state is in "
            f"the masters' precision, {masters}; leave it out, or set engine.master_dtype"
        )


def leaf(config: Any, key: str) -> Any:
    """The value at a dotted key; None where there is none."""
    for part in key.split("."):
        config = config.get(part) if isinstance(config, Mapping) else None
    return config


def _listed(values: Mapping[Any, Any]) -> str:
    words = [_word(value) for value in values]
    return f"{', '.join(words[:-1])} or {words[-1]}"


def _word(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
