"""LoRA adapters among the weights: by the names that PEFT reads, or merged into their model.

A live model holds `base_model.model.<module>.lora_A.<adapter>.weight` and its like beside
`….base_layer.weight`; an adapter's own file leaves the adapter's name out. Merged, a weight is
W + scaling · B·A, in PEFT's terms.
https://github.com/huggingface/peft/blob/main/src/peft/tuners/lora/layer.py
"""

from __future__ import annotations

import math
import re
from collections.abc import Container, Iterable, Mapping
from typing import Any, NamedTuple

from bigtrain.checkpoint.consolidate.adapter_config import (
    ADAPTED_BIASES,
    NO_BIASES,
    NOT_TAKEN_OUT,
)
from bigtrain.checkpoint.consolidate.frames import LowRank
from bigtrain.checkpoint.index import BUFFER, TensorEntry
from bigtrain.errors import CheckpointError

_MATRICES = ("lora_A", "lora_B")
_BARE = ("lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector")
_LEAVES = ("weight", "bias")
_PEFT = "base_model.model."
_SAVED = "modules_to_save"
_WRAPPED = ("base_layer", "original_module")
_CONV1D = ("c_attn", "c_proj", "c_fc", "q_attn")
"""Layers of transformers that are stored transposed."""
_FLOATS = ("float32", "float16", "bfloat16")


class _Piece(NamedTuple):
    """One tensor of an adapter, from its name."""

    module: str
    role: str
    adapter: str | None
    leaf: str
    """`weight` or `bias`; of embeddings and magnitudes nothing."""

    @property
    def in_a_file(self) -> str:
        """Its name in a file of PEFT's."""
        return _PEFT + ".".join(part for part in (self.module, self.role, self.leaf) if part)


def is_adapter(names: Iterable[str], *, has_config: bool) -> bool:
    """Whether these are a low-rank adapter of PEFT's, maybe with its model.

    Some models have such tensors of their own, which PEFT knows nothing of.
    """
    every = list(names)
    peft = has_config or any(name.startswith(_PEFT) for name in every)
    return peft and any(_piece(name) is not None for name in every)


def is_whole(names: Iterable[str]) -> bool:
    """Whether the adapted model's own weights are there too.

    PEFT's own files leave the adapter's name out, and hold base layers' biases and embeddings where
    those were trained.
    """
    every = list(names)
    is_live = any(piece.adapter for piece in map(_piece, every) if piece)
    return is_live and any(
        "base_layer" in name.split(".") and not name.endswith(".bias") for name in every
    )


def adapter_tensors(
    weights: Mapping[str, TensorEntry], *, biases: str = NO_BIASES
) -> dict[str, TensorEntry]:
    """The adapter's tensors, by the names in a file of PEFT's.

    `biases` of a whole model were trained with it. CheckpointError where PEFT would write what
    isn't known here.
    """
    whole = is_whole(weights)
    _check_known(weights, whole=whole)
    pieces = {name: piece for name in weights if (piece := _piece(name))}
    _check_one(pieces.values())
    adapted = {piece.module for piece in pieces.values()}
    found: dict[str, TensorEntry] = {}
    for name, entry in weights.items():
        is_kept = not whole or _is_trained_bias(name, adapted, biases=biases)
        if name in pieces:
            short = pieces[name].in_a_file
        elif _SAVED in name.split(".") or (is_kept and entry.kind != BUFFER):
            short = _PEFT + _saved(name)
        else:
            continue
        if short in found:
            raise CheckpointError(f"there are several adapters: {name} is another {short}")
        found[short] = entry
    return found


def merged_tensors(
    weights: Mapping[str, TensorEntry],
    base: Mapping[str, TensorEntry],
    config: Mapping[str, Any],
) -> dict[str, tuple[TensorEntry, LowRank | None]]:
    """The model's tensors by their plain names, each with what is to be added to it.

    `base` are the model's own weights where `weights` hold only the adapter.
    """
    found: dict[str, tuple[TensorEntry, LowRank | None]] = {k: (e, None) for k, e in base.items()}
    pieces: dict[str, dict[str, TensorEntry]] = {}
    saved: dict[str, TensorEntry] = {}
    _check_one(piece for piece in map(_piece, weights) if piece)
    for name, entry in weights.items():
        piece = _piece(name)
        if piece is not None:
            pieces.setdefault(piece.module, {})[piece.role] = entry
        elif _SAVED in name.split("."):
            saved[_plain(name)] = entry
        else:
            found[_plain(name)] = (entry, None)
    found |= {name: (entry, None) for name, entry in saved.items()}
    for module, roles in pieces.items():
        name = f"{module}.weight"
        if name not in found:
            raise CheckpointError(f"the adapter changes {name}, which the model doesn't have")
        found[name] = (found[name][0], _update(name, found[name][0], roles, config))
    return found


def _update(
    name: str, weight: TensorEntry, roles: Mapping[str, TensorEntry], config: Mapping[str, Any]
) -> LowRank:
    is_embedding = "lora_embedding_A" in roles
    names = _BARE[:2] if is_embedding else _MATRICES
    if set(roles) != set(names):
        raise CheckpointError(f"{name} is adapted by {', '.join(sorted(roles))}: can't be merged")
    a, b = roles[names[0]], roles[names[1]]
    rank = a.shape[0]
    rows, columns = b.shape[0], a.numel // max(1, rank)
    transposed = is_embedding or bool(config.get("fan_in_fan_out"))
    shape = (columns, rows) if transposed else (rows, columns)
    flat = (weight.shape[0], weight.numel // max(1, weight.shape[0])) if weight.shape else ()
    if flat != shape or b.numel != rows * rank or weight.dtype.name not in _FLOATS:
        raise CheckpointError(
            f"{name} is {weight.dtype.name} {weight.shape}, to which an adapter of shape {a.shape} "
            f"and {b.shape} can't be added (is the model quantised?)"
        )
    leaf = name.removesuffix(".weight").rpartition(".")[2]
    if transposed and not is_embedding and rows == columns and leaf not in _CONV1D:
        raise CheckpointError(
            f"{name} is square, and PEFT follows fan_in_fan_out in some kinds of layers only: "
            "which way it is stored can't be told; merge it by PEFT's merge_and_unload"
        )
    said = _at(name, config.get("rank_pattern"), config.get("r", rank))
    if said != rank:
        raise CheckpointError(
            f"{name} is adapted with rank {rank}, and its configuration says {said}: they don't "
            "belong together"
        )
    alpha = _at(name, config.get("alpha_pattern"), config.get("lora_alpha", 8))
    scaling = float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)
    return LowRank(a=a, b=b, rank=rank, scaling=scaling, is_transposed=transposed)


def _at(name: str, patterns: Mapping[str, float] | None, otherwise: float) -> float:
    """What the first pattern that this weight's module has says, as PEFT finds it."""
    module = name.removesuffix(".weight")
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return otherwise


def _piece(name: str) -> _Piece | None:
    parts = name.split(".")
    for position, part in enumerate(parts):
        if part in (*_MATRICES, *_BARE):
            module = ".".join(parts[:position]).removeprefix(_PEFT)
            *adapter, last = ["", *parts[position + 1 :]]
            if last not in _LEAVES:
                adapter, last = [*adapter, last], ""
            leaf = last if part in _MATRICES else ""
            return _Piece(module, part, ".".join(filter(None, adapter)) or None, leaf)
    return None


def _check_known(names: Iterable[str], *, whole: bool) -> None:
    """Raise for what an adapter of another kind has, unless it already has a file's name."""
    for name in names:
        parts = name.split(".")
        for position, part in enumerate(parts):
            is_foreign = part.startswith("lora_") and part not in (*_MATRICES, *_BARE)
            is_last = position + 1 == len(parts)
            if (is_foreign or part.startswith("trainable_tokens")) and (whole or not is_last):
                raise CheckpointError(f"{name} belongs to no plain LoRA adapter, {NOT_TAKEN_OUT}")


def _check_one(pieces: Iterable[_Piece]) -> None:
    adapters = {piece.adapter or "default" for piece in pieces}
    if len(adapters) > 1:
        raise CheckpointError(f"there are several adapters: {', '.join(sorted(adapters))}")


def _is_trained_bias(name: str, adapted: Container[str], *, biases: str) -> bool:
    if biases == NO_BIASES or not name.endswith(".bias"):
        return False
    module = name.removeprefix(_PEFT).removesuffix(".base_layer.bias")
    return biases != ADAPTED_BIASES or module in adapted


def _saved(name: str) -> str:
    """The name in a file of PEFT's of what was saved with an adapter."""
    parts = name.removeprefix(_PEFT).split(".")
    if _SAVED in parts:
        at = parts.index(_SAVED)
        parts = parts[:at] + parts[at + 2 :]
    return ".".join(parts)


def _plain(name: str) -> str:
    """The name without PEFT's wrappers."""
    return ".".join(part for part in _saved(name).split(".") if part not in _WRAPPED)
