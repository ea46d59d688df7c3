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
_ONE_WAY: Mapping[str, tuple[Any, str]] = {
    "activation_checkpointing.partition_activations": (False, _RECOMPUTED),
    "activation_checkpointing.cpu_checkpointing": (False, _RECOMPUTED),
    "activation_checkpointing.contiguous_memory_optimization": (False, _RECOMPUTED),
    "activation_checkpointing.number_checkpoints": (None, _RECOMPUTED),
    "fp16.fp16_master_weights_and_grads": (False, "masters are fp32 here; leave it out"),
    "zero_allow_untested_optimizer": (True, "the loop hands in a torch optimizer; leave it out"),
    "zero_force_ds_cpu_optimizer": (False, "the loop hands in a torch optimizer; leave it out"),
}
"""Key → the only value that it can have here, and why."""
_OLDER_NAMES: Mapping[str, str] = {
    "bfloat16": "bf16",
    f"{_ZERO}.cpu_offload": 'offload_optimizer: {"device": "cpu"}',
    f"{_ZERO}.cpu_offload_param": 'offload_param: {"device": "cpu"}',
    f"{_ZERO}.cpu_offload_use_pin_memory": "offload_optimizer.pin_memory",
}
_PARALLEL = (
    *("tensor_parallel", "pipeline", "expert_parallel", "sequence_parallel_size"),
    *("hybrid_engine", "autotuning"),
)


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
    yield from _precision_faults(given, options)


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
