"""transformers' `fsdp` and `fsdp_config`, in FSDP1's words or FSDP2's: as engine options.

A key that asks for what FSDP2 always does is granted; one that it has no counterpart for is
refused by name. https://huggingface.co/docs/accelerate/concept_guides/fsdp1_vs_fsdp2
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from bigtrain.translate.config import EngineOptions
from bigtrain.translate.given_json import read

_WORDS = frozenset({"full_shard", "shard_grad_op", "auto_wrap", "offload"})
_HYBRID = ("hybrid_shard", "hybrid_shard_zero2", "HYBRID_SHARD", "HYBRID_SHARD_ZERO2")
_KEYS: Mapping[str, str] = {
    "reshard_after_forward": "reshard_after_forward",
    "cpu_offload": "cpu_offload",
    "offload_params": "cpu_offload",
    "transformer_layer_cls_to_wrap": "wrap_classes",
    "sharding_strategy": "reshard_after_forward",
}
# FSDP1's strategies by name and by number, as whether FSDP2 reshards after the forward pass.
_STRATEGIES: Mapping[Any, bool] = {
    "FULL_SHARD": True,
    "SHARD_GRAD_OP": False,
    1: True,
    2: False,
    "1": True,
    "2": False,
}
# Keys that ask for what happens here anyway, with the values that say so.
_GRANTED: Mapping[str, tuple[Any, ...]] = {
    "version": (1, 2),
    "use_orig_params": (True,),
    "sync_module_states": (True,),
    "auto_wrap_policy": ("TRANSFORMER_BASED_WRAP",),
    "cpu_ram_efficient_loading": (True, False),
    "limit_all_gathers": (True,),
    "backward_prefetch": ("backward_pre", "BACKWARD_PRE"),
    "backward_prefetch_policy": ("BACKWARD_PRE",),
    "forward_prefetch": (False,),
    "min_num_params": (0,),
    "state_dict_type": ("SHARDED_STATE_DICT", "FULL_STATE_DICT"),
    "xla": (False,),
    "xla_fsdp_v2": (False,),
    "xla_fsdp_grad_ckpt": (False,),
}


def merge(options: EngineOptions, values: Mapping[str, Any]) -> EngineOptions:
    """`options` with what `fsdp` and `fsdp_config` say where the options themselves say nothing."""
    if not values.get("fsdp"):
        return options
    found: dict[str, Any] = {}
    words = _words(values["fsdp"])
    if "shard_grad_op" in words:
        found["reshard_after_forward"] = False
    if "offload" in words:
        found["cpu_offload"] = True
    for key, value in _config(values).items():
        if _KEYS.get(key) == "reshard_after_forward" and not isinstance(value, bool):
            found["reshard_after_forward"] = _STRATEGIES.get(value)
        elif key == "forward_prefetch" and value is True:
            found["forward_prefetch"] = 1
        elif key in _KEYS and value is not None:
            found[_KEYS[key]] = value
    names = found.get("wrap_classes")
    if isinstance(names, (str, list)):
        found["wrap_classes"] = tuple(names.split(",") if isinstance(names, str) else names)
    unsaid = {key: value for key, value in found.items() if getattr(options, key) is None}
    return replace(options, **unsaid)


def faults(values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(field, what is wrong and the fix) for each word and key that can't be followed."""
    for word in _words(values["fsdp"]):
        if word in _HYBRID:
            yield "fsdp", f"{word}: say it by engine.shard, the number of ranks that share a copy"
        elif word not in _WORDS and word not in ("True", "true"):
            yield "fsdp", f"{word!r} is not supported; use {', '.join(sorted(_WORDS))}"
    for key, value in _config(values).items():
        why = _key_fault(key, value)
        if why:
            yield "fsdp_config", why


def _key_fault(key: str, value: Any) -> str:
    if value is None or value in _GRANTED.get(key, ()):
        return ""
    if key in ("sharding_strategy", "reshard_after_forward") and not isinstance(value, bool):
        if value in _STRATEGIES:
            return ""
        if value in _HYBRID:
            return f"{key}: {value}: say it by engine.shard, the ranks that share a copy"
        return f"{key}: {value!r} is not supported; use FULL_SHARD or SHARD_GRAD_OP, or engine ddp"
    if key in _KEYS or (key == "forward_prefetch" and value is True):
        return ""
    if key == "activation_checkpointing":
        return f"{key} is said by training.gradient_checkpointing here" if value else ""
    return f"{key}: {value!r} has no counterpart in FSDP2 here; leave it out"


def _words(fsdp: Any) -> list[str]:
    if isinstance(fsdp, str):
        return fsdp.replace(",", " ").split()
    return [str(getattr(word, "value", word)) for word in fsdp] if isinstance(fsdp, list) else []


def _config(values: Mapping[str, Any]) -> dict[str, Any]:
    config = read(values.get("fsdp_config") or {}, "fsdp_config")
    return {key.removeprefix("fsdp_"): _truth(value) for key, value in config.items()}


def _truth(value: Any) -> Any:
    words = {"true": True, "false": False}
    return words.get(value.lower(), value) if isinstance(value, str) else value
