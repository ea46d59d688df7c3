"""The names that `from_pretrained` needs, from those that engines and wrappers leave."""

from __future__ import annotations

from collections.abc import Iterable

from bigtrain.checkpoint.inert import brief
from bigtrain.errors import CheckpointError

_WRAPPERS = frozenset(
    {
        "_orig_mod",  # torch.compile
        "_fsdp_wrapped_module",
        "_checkpoint_wrapped_module",
        "_forward_module",  # Lightning
    }
)
AUTO = "auto"


def plain_names(names: Iterable[str], *, prefix: str = AUTO) -> dict[str, str]:
    """Each name without what wrappers added to it; `prefix` is cut off, or found out."""
    names = list(names)
    if broken := [name for name in names if not _is_text(name)]:
        shown = ascii(broken[0]) if isinstance(broken[0], str) else brief(broken[0])
        raise CheckpointError(f"{shown} can't be a tensor's name: it is no text")
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


def _is_text(name: object) -> bool:
    """Text has no halves of surrogate pairs, and can be written as UTF-8."""
    return isinstance(name, str) and not any("\ud800" <= letter <= "\udfff" for letter in name)


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
    # Not `transformer`: LLaDA's and OLMo's own names begin with `model.transformer.`.
    heads = {"model", "lm_head", "bert", "roberta", "encoder_decoder", "base_model"}
    if every and all(name.startswith("model.") for name in every) and inner & heads:
        return cut + "model."
    return cut
