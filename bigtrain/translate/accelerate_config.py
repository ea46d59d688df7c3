"""An accelerate config file (`accelerate config` writes it), as values of a run file.

Each of its keys becomes one of ours, is without effect here for a reason, or is refused by name.
https://huggingface.co/docs/accelerate/package_reference/cli#accelerate-config
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from bigtrain.errors import ConfigError
from bigtrain.layers import Override
from bigtrain.translate.config import EngineName

_PRECISIONS: Mapping[str, str | None] = {"no": None, "bf16": "bf16", "fp16": "fp16"}
_KINDS = ("NO", "MULTI_GPU", "MULTI_CPU", "DEEPSPEED", "FSDP")
# The launcher finds these out itself, or they are about a cloud's service that is not used.
_WITHOUT_EFFECT = frozenset(
    {
        "compute_environment",
        "debug",
        "machine_rank",
        "main_process_ip",
        "main_process_port",
        "main_training_function",
        "rdzv_backend",
        "same_network",
        "enable_cpu_affinity",
        "tpu_env",
        "tpu_use_cluster",
        "tpu_use_sudo",
        "downcast_bf16",
    }
)
_TYPES: Mapping[str, type] = {
    "deepspeed_config": dict,
    "fsdp_config": dict,
    "distributed_type": str,
    "num_processes": int,
    "num_machines": int,
    "use_cpu": bool,
}
_READ = (*_TYPES, "gpu_ids", "mixed_precision")
_TYPE_NAMES = {dict: "a section", str: "text", int: "a whole number", bool: "true or false"}
_DEEPSPEED_KEYS = {
    "gradient_accumulation_steps": "training.gradient_accumulation_steps",
    "gradient_clipping": "training.max_grad_norm",
    "offload_optimizer_device": "engine.offload_optimizer",
    "offload_param_device": "engine.offload_parameters",
    "deepspeed_config_file": "training.deepspeed",
}
_DEEPSPEED_GRANTED = {
    "zero3_init_flag": (True, False),
    "zero3_save_16bit_model": (True, False),
    "deepspeed_multinode_launcher": ("standard",),
    "deepspeed_moe_layer_cls_names": (None, ""),
}
_NVME_KEYS = ("offload_optimizer_nvme_path", "offload_param_nvme_path")


def overrides(content: Mapping[str, Any], *, label: str) -> list[Override]:
    """What the file says, each with `label: key` as its origin. ConfigError with all its faults."""
    mistyped = list(_mistyped(content))
    faults = [f"{label}: {fault}" for fault in mistyped or _faults(content)]
    if faults:
        raise ConfigError(faults)
    found = [*_cluster(content), *_precision(content), *_engine(content)]
    return [
        Override(key=key, value=value, origin=f"{label}: {source}") for key, value, source in found
    ]


_Said = Iterator[tuple[str, Any, str]]


def _cluster(content: Mapping[str, Any]) -> _Said:
    machines = content.get("num_machines") or 1
    yield "cluster.nodes", machines, "num_machines"
    processes = content.get("num_processes")
    if processes:
        yield "cluster.procs_per_node", processes // machines, "num_processes"
    if content.get("use_cpu"):
        yield "training.use_cpu", True, "use_cpu"
    devices = content.get("gpu_ids")
    if devices not in (None, "all", ""):
        yield "cluster.env.CUDA_VISIBLE_DEVICES", str(devices), "gpu_ids"


def _kind(content: Mapping[str, Any]) -> str:
    """`distributed_type`; an unquoted `no` is false to a reader of YAML 1.1, as accelerate's is."""
    said = content.get("distributed_type") or "NO"
    return "NO" if said == "no" else str(said)


def _asks_nothing(value: Any) -> bool:
    """Whether it is off, or a section of which all is off."""
    if isinstance(value, Mapping):
        return all(_asks_nothing(inner) for inner in value.values())
    return not value or (isinstance(value, str) and value.lower() in ("no", "default"))


def _precision(content: Mapping[str, Any]) -> _Said:
    said = content.get("mixed_precision")
    precision = _PRECISIONS.get(str(said or "no"))
    if precision:
        yield f"training.{precision}", True, "mixed_precision"
    elif said:  # which it says out loud, and so contradicts bf16: true
        yield "training.bf16", False, "mixed_precision"
        yield "training.fp16", False, "mixed_precision"


def _engine(content: Mapping[str, Any]) -> _Said:
    kind = _kind(content)
    if kind == "DEEPSPEED":
        yield from _deepspeed(content.get("deepspeed_config") or {})
    elif kind == "FSDP":
        yield "engine.name", "fsdp", "distributed_type"
        config = dict(content.get("fsdp_config") or {})
        if config.pop("fsdp_activation_checkpointing", False):
            source = "fsdp_config.fsdp_activation_checkpointing"
            yield "training.gradient_checkpointing", True, source
        yield "training.fsdp_config", config, "fsdp_config"
    else:
        single: EngineName = "single"
        alone = kind == "NO" and (content.get("num_processes") or 1) == 1
        yield "engine.name", single if alone else "ddp", "distributed_type"


def _deepspeed(config: Mapping[str, Any]) -> _Said:
    if not config.get("deepspeed_config_file"):
        yield "engine.name", f"zero{config.get('zero_stage', 2)}", "deepspeed_config.zero_stage"
    for key, ours in _DEEPSPEED_KEYS.items():
        value = config.get(key)
        if value not in (None, "none", "auto"):
            yield ours, value, f"deepspeed_config.{key}"
    for key in _NVME_KEYS:
        if config.get(key) not in (None, "none"):
            yield "engine.nvme_path", config[key], f"deepspeed_config.{key}"


def _mistyped(content: Mapping[str, Any]) -> Iterator[str]:
    for key, kind in _TYPES.items():
        value = content.get(key)
        if value is False and key == "distributed_type":
            continue
        if value is not None and type(value) is not kind:
            yield f"{key} is {value!r}, not {_TYPE_NAMES[kind]}"
        elif isinstance(value, int) and kind is int and value < 1:
            yield f"{key} is {value}; it must be at least 1"


def _faults(content: Mapping[str, Any]) -> Iterator[str]:
    kind = _kind(content)
    if kind not in _KINDS:
        yield f"distributed_type {kind} is not supported; use {', '.join(_KINDS)}"
    if str(content.get("mixed_precision") or "no") not in _PRECISIONS:
        precision = content["mixed_precision"]
        yield f"mixed_precision {precision} is not supported; use {', '.join(_PRECISIONS)}"
    machines, processes = content.get("num_machines") or 1, content.get("num_processes") or 0
    if processes % machines:
        yield f"num_processes {processes} is not divisible by num_machines {machines}"
    for key, value in content.items():
        if key not in (*_WITHOUT_EFFECT, *_READ) and not _asks_nothing(value):
            yield f"{key} has no counterpart here; leave it out"
    for section, owner in (("deepspeed_config", "DEEPSPEED"), ("fsdp_config", "FSDP")):
        if content.get(section) and kind != owner:
            yield f"{section} is said, but distributed_type is {kind}; leave one out"
    if kind == "DEEPSPEED":
        yield from _deepspeed_faults(content.get("deepspeed_config") or {})


def _deepspeed_faults(config: Mapping[str, Any]) -> Iterator[str]:
    stage = config.get("zero_stage", 2)
    if not config.get("deepspeed_config_file") and (stage not in (1, 2, 3) or stage is True):
        yield f"deepspeed_config.zero_stage {stage} is not supported; use 1, 2 or 3"
    for key, value in config.items():
        if key in _DEEPSPEED_KEYS or key in _NVME_KEYS or key == "zero_stage":
            continue
        if not any(value == granted for granted in _DEEPSPEED_GRANTED.get(key, ())):
            yield f"deepspeed_config.{key}: {value!r} has no counterpart here; leave it out"
