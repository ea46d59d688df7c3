"""transformers' `fsdp` and `fsdp_config`, in FSDP1's words or FSDP2's: as engine options.

A key that asks for what FSDP2 always does is granted; one that it has no counterpart for is
refused by name. https://huggingface.co/docs/accelerate/concept_guides/fsdp1_vs_fsdp2
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from bigtrain.topology import Topology
from bigtrain.translate.config import EngineName
from bigtrain.translate.given import GivenOption
from bigtrain.translate.given_json import read

_WORDS = frozenset(
    {"full_shard", "shard_grad_op", "auto_wrap", "offload", "hybrid_shard", "hybrid_shard_zero2"}
)
_OPTION_WORDS: Mapping[str, tuple[str, bool]] = {
    "shard_grad_op": ("reshard_after_forward", False),
    "hybrid_shard_zero2": ("reshard_after_forward", False),
    "offload": ("cpu_offload", True),
}
_KEYS: Mapping[str, str] = {
    "reshard_after_forward": "reshard_after_forward",
    "cpu_offload": "cpu_offload",
    "offload_params": "cpu_offload",
    "transformer_layer_cls_to_wrap": "wrap_classes",
    "sharding_strategy": "reshard_after_forward",
}
# FSDP1's strategies by name and by number, as whether FSDP2 reshards after the forward pass.
# Hybrid ones also say by what the mesh is cut: https://pytorch.org/docs/stable/fsdp.html
_STRATEGIES: Mapping[str, bool] = {
    "FULL_SHARD": True,
    "SHARD_GRAD_OP": False,
    "HYBRID_SHARD": True,
    "HYBRID_SHARD_ZERO2": False,
    "_HYBRID_SHARD_ZERO2": False,
    "1": True,
    "2": False,
    "4": True,
    "5": False,
}
RECOMPUTATION = "activation_checkpointing"
"""The key of `fsdp_config` that is a TrainingArguments field here."""
_HYBRID = ("HYBRID_SHARD", "HYBRID_SHARD_ZERO2", "_HYBRID_SHARD_ZERO2", "4", "5")
# Keys that ask for what happens here anyway, with the values that say so; text in upper case.
_GRANTED: Mapping[str, tuple[Any, ...]] = {
    "version": (1, 2),
    "use_orig_params": (True,),
    "sync_module_states": (True,),
    "auto_wrap_policy": ("TRANSFORMER_BASED_WRAP",),
    "cpu_ram_efficient_loading": (True, False),
    "limit_all_gathers": (True,),
    "backward_prefetch": ("BACKWARD_PRE",),
    "backward_prefetch_policy": ("BACKWARD_PRE",),
    "forward_prefetch": (False,),
    "min_num_params": (0,),
    "state_dict_type": ("SHARDED_STATE_DICT", "FULL_STATE_DICT"),
    "xla": (False,),
    "xla_fsdp_v2": (False,),
    "xla_fsdp_grad_ckpt": (False,),
}


def options(values: Mapping[str, Any]) -> Iterator[GivenOption]:
    """What they say of the engine."""
    words = _words(values.get("fsdp"))
    for word, (option, value) in _OPTION_WORDS.items():
        if word in words:
            yield GivenOption(option=option, value=value, field="fsdp", key=word, spelled="said")
    for key, spelled in _config(values).items():
        found = _read(key, spelled)
        if found is not None:
            yield GivenOption(
                option=found[0], value=found[1], field="fsdp_config", key=key, spelled=spelled
            )


def _read(key: str, spelled: Any) -> tuple[str, Any] | None:
    """The option and its value that a key of `fsdp_config` says; None where it says none."""
    option = _KEYS.get(key)
    if key == "forward_prefetch":
        return ("forward_prefetch", 1) if spelled is True else None
    if option is None or spelled is None:
        return None
    if option == "reshard_after_forward" and not isinstance(spelled, bool):
        strategy = _strategy(spelled)
        return None if strategy is None else (option, strategy)
    if option == "wrap_classes":
        names = _names(spelled)
        return (option, names) if names else None
    return option, spelled


def _names(spelled: Any) -> tuple[str, ...] | None:
    """Class names, from a list or from text with commas; None where it is neither."""
    names = spelled.split(",") if isinstance(spelled, str) else spelled
    if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
        return None
    return tuple(name.strip() for name in names if name.strip())


def recomputes(values: Mapping[str, Any]) -> bool:
    """Whether they ask to compute activations again, which is the model's own doing here."""
    return _config(values).get(RECOMPUTATION) is True


def shards_by_node(values: Mapping[str, Any]) -> bool:
    """Whether they ask for hybrid sharding, which FSDP2 does by a mesh of replicate × shard."""
    config = _config(values)
    strategies = (config.get("sharding_strategy"), config.get("reshard_after_forward"))
    return any(_is_hybrid(word) for word in (*_words(values.get("fsdp")), *strategies))


def faults(
    values: Mapping[str, Any], *, engine: EngineName, topology: Topology
) -> Iterator[tuple[str, str]]:
    """(field, what is wrong and the fix) for each word and key that can't be followed."""
    for word in _words(values.get("fsdp")):
        if word not in (*_WORDS, "True", "true") and not _is_hybrid(word):
            yield "fsdp", f"{word!r} is not supported; use {', '.join(sorted(_WORDS))}"
    config = _config(values)
    if config and engine != "fsdp":
        yield (
            "fsdp_config",
            f"the engine is {engine}, and only fsdp reads it; set fsdp: full_shard, or leave it "
            "out",
        )
    for key, value in config.items():
        why = _key_fault(key, value)
        if why:
            yield "fsdp_config", why
    yield from _mesh_faults(values)
    if engine == "fsdp" and shards_by_node(values):
        shard, procs = topology.shard_size, topology.procs_per_node
        if shard != procs:
            yield (
                "fsdp",
                f"hybrid sharding cuts over the {procs} processes of a node, but the shard is "
                f"{shard} (engine.shard); leave one of them out",
            )


def _mesh_faults(values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Hybrid sharding in one place, and sharding over all ranks in the other."""
    config = _config(values)
    for word in _words(values.get("fsdp")):
        for key in ("sharding_strategy", "reshard_after_forward"):
            said = config.get(key)
            reshards = _strategy(word)
            if reshards is None or reshards is not _strategy(said):
                continue  # none of the two is a strategy, or they differ in another way
            if _is_hybrid(word) != _is_hybrid(said):
                why = f"{key} is {said} there, but fsdp's {word} is said"
                yield "fsdp_config", f"{why}; neither wins: leave one out"


def _key_fault(key: str, value: Any) -> str:
    plain = value.upper() if isinstance(value, str) else value
    if value is None or any(plain == granted for granted in _GRANTED.get(key, ())):
        return ""
    if key in ("sharding_strategy", "reshard_after_forward"):
        is_truth = key == "reshard_after_forward" and isinstance(value, bool)
        if is_truth or _strategy(value) is not None:
            return ""
        return f"{key}: {value!r} is not supported; use {_STRATEGY_NAMES}, or engine ddp"
    if key in ("cpu_offload", "offload_params", "forward_prefetch", RECOMPUTATION):
        return "" if isinstance(value, bool) else f"{key}: {value!r} is not true or false"
    if key == "transformer_layer_cls_to_wrap":
        return "" if _names(value) is not None else f"{key}: {value!r} is not a list of class names"
    return f"{key}: {value!r} has no counterpart in FSDP2 here; leave it out"


_STRATEGY_NAMES = "FULL_SHARD, SHARD_GRAD_OP, HYBRID_SHARD or HYBRID_SHARD_ZERO2"


def _strategy(value: Any) -> bool | None:
    return None if isinstance(value, bool) else _STRATEGIES.get(str(value).upper())


def _is_hybrid(value: Any) -> bool:
    return not isinstance(value, bool) and str(value).upper() in _HYBRID


def _words(fsdp: Any) -> list[str]:
    if isinstance(fsdp, str):
        return fsdp.replace(",", " ").split()
    return [str(getattr(word, "value", word)) for word in fsdp] if isinstance(fsdp, list) else []


def _config(values: Mapping[str, Any]) -> dict[str, Any]:
    config = read(values.get("fsdp_config") or {}, "fsdp_config")
    return {key.removeprefix("fsdp_"): _plain(value) for key, value in config.items()}


def _plain(value: Any) -> Any:
    """Text that spells a truth or a whole number, as that."""
    if not isinstance(value, str):
        return value
    truths = {"true": True, "false": False}
    return int(value) if value.isdecimal() else truths.get(value.lower(), value)
