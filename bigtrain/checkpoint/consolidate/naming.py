"""The names that `from_pretrained` needs, from those that engines and wrappers leave."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from bigtrain.checkpoint.index import TensorEntry
from bigtrain.errors import CheckpointError

_WRAPPERS = frozenset(
    {
        "_orig_mod",  # torch.compile
        "_fsdp_wrapped_module",
        "_checkpoint_wrapped_module",
        "_forward_module",  # Lightning
    }
)
_ADAPTER = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector")
_PEFT = "base_model.model."
AUTO = "auto"


def plain_names(names: Iterable[str], *, prefix: str = AUTO) -> dict[str, str]:
    """Each name without what wrappers added to it; `prefix` is cut off, or found out."""
    plain = {name: _without_wrappers(name) for name in names}
    cut = _outer_prefix(plain.values()) if prefix == AUTO else prefix
    if missing := [name for name in plain.values() if not name.startswith(cut)]:
        raise CheckpointError(f"{missing[0]} does not begin with the prefix {cut!r}")
    plain = {name: short.removeprefix(cut) for name, short in plain.items()}
    seen: dict[str, str] = {}
    for name, short in plain.items():
        if short in seen:
            raise CheckpointError(f"{seen[short]} and {name} would both be named {short}")
        seen[short] = name
    return plain


def _without_wrappers(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def _outer_prefix(names: Iterable[str]) -> str:
    """What DDP and Lightning put before every name; the model's own `model.` stays."""
    every = list(names)
    cut = ""
    while every and all(name.startswith("module.") for name in every):
        cut += "module."
        every = [name.removeprefix("module.") for name in every]
    inner = {name.split(".")[1] for name in every if name.startswith("model.") and "." in name[6:]}
    heads = {"model", "transformer", "lm_head", "bert", "roberta", "encoder_decoder"}
    if every and all(name.startswith("model.") for name in every) and inner & heads:
        return cut + "model."
    return cut


def is_adapter(names: Iterable[str]) -> bool:
    """Whether PEFT's low-rank adapters are among the tensors."""
    return any(part in _ADAPTER for name in names for part in name.split("."))


def split_adapter(
    weights: Mapping[str, TensorEntry],
) -> tuple[dict[str, TensorEntry], dict[str, TensorEntry]]:
    """(the base model's tensors, the adapter's), each by the name that its reader expects."""
    base: dict[str, TensorEntry] = {}
    adapter: dict[str, TensorEntry] = {}
    for name, entry in weights.items():
        parts = name.split(".")
        if any(part in _ADAPTER for part in parts):
            adapter[_without_adapter_name(parts)] = entry
        elif "modules_to_save" in parts:
            adapter[_saved_module(parts)] = entry
        else:
            base[_base_name(name)] = entry
    return base, adapter


def _base_name(name: str) -> str:
    parts = name.removeprefix(_PEFT).split(".")
    return ".".join(part for part in parts if part not in ("base_layer", "original_module"))


def _without_adapter_name(parts: list[str]) -> str:
    """`….lora_A.default.weight` is `….lora_A.weight` in an adapter's file."""
    at = next(position for position, part in enumerate(parts) if part in _ADAPTER)
    return ".".join(parts[: at + 1] + parts[at + 2 :])


def _saved_module(parts: list[str]) -> str:
    at = parts.index("modules_to_save")
    return ".".join(parts[:at] + parts[at + 2 :])
