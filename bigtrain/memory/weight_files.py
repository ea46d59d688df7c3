"""Parameters from the headers of a model's safetensors files: a few kilobytes of each are read.

transformers 5 holds the experts of a layer as one tensor, while files hold them one by one; they
are put together here as it does (its `conversion_mapping.py`), so that shapes are the modules'.
What is stored and the model has no parameter for is left out, as far as names tell it: masks and
rotary frequencies of older versions, heads for other tasks, and one that is tied to the embeddings.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bigtrain.checkpoint.formats.safetensors import read_safetensors
from bigtrain.checkpoint.json_object import indexed_files
from bigtrain.errors import CheckpointError, ConfigError
from bigtrain.memory.families import architecture, complete
from bigtrain.memory.shapes import ModelShapes, Parameter

_ONE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_EXPERT = re.compile(
    r"^(?P<owner>.*\.experts)\.(?P<number>\d+)\."
    r"(?P<part>w1|w2|w3|gate_proj|up_proj|down_proj)\.weight$"
)
_UNUSED = re.compile(
    r"(?:^|\.)(?:(?:attn|attention)\.(?:bias|masked_bias)|rotary_emb\.inv_freq|position_ids"
    r"|pooler\.dense\.(?:weight|bias)|seq_relationship\.(?:weight|bias))$"
)
_LAYER = re.compile(r"^((?:[a-z_]\w*\.)*)(\d+)\.")
_HEAD = re.compile(r"(?:^|\.)(?:lm_head|embed_out|output|decoder)\.weight$")
_DOWN = ("w2", "down_proj")


@dataclass(frozen=True, kw_only=True)
class Stored:
    """What weight files hold."""

    shapes: ModelShapes
    is_exact: bool
    """Whether this is, as far as can be told, what a model loads that is made by the config: with
    its layers and a head, and nothing beside."""


def from_weight_files(
    folder: Path, config: Mapping[str, Any], *, dtype: str | None
) -> Stored | None:
    """The parameters in the safetensors files of `folder`; None where there are none.

    `dtype` is what they are loaded as; None: as they are stored.
    """
    try:
        files = _files(folder)
        index = read_safetensors(files)
    except (CheckpointError, OSError) as error:
        raise ConfigError(f"model.name: {error}") from error
    if not files:
        return None
    stored = {
        name: (entry.shape, dtype or entry.dtype.name)
        for (name, _), entry in index.entries.items()
        if not _UNUSED.search(name)
    }
    is_tied = bool(complete(config).get("tie_word_embeddings"))
    if is_tied and len(stored) > 1:
        stored.pop("lm_head.weight", None)
    parameters = tuple(
        Parameter(name=name, shape=shape, dtype=kind) for name, (shape, kind) in _merged(stored)
    )
    named = files[0].name if len(files) == 1 else f"{len(files)} safetensors files"
    found = architecture(config)
    layers = found.layers if found is not None else None
    return Stored(
        shapes=ModelShapes(parameters=parameters, source=f"headers of {named}", architecture=found),
        is_exact=len(stored) == len(index.entries)
        and _count_layers(stored) == layers
        and (is_tied or any(map(_HEAD.search, stored))),
    )


def _count_layers(names: Iterable[str]) -> int:
    """Of the list of modules with the most elements."""
    lists: dict[str, set[str]] = {}
    for name in names:
        if found := _LAYER.match(name):
            lists.setdefault(found[1], set()).add(found[2])
    return max(map(len, lists.values()), default=0)


def _files(folder: Path) -> list[Path]:
    if (folder / _ONE).is_file():
        return [folder / _ONE]
    index = folder / _INDEX
    return list(indexed_files(index)) if index.is_file() else []


def _merged(
    stored: Mapping[str, tuple[tuple[int, ...], str]],
) -> Iterator[tuple[str, tuple[tuple[int, ...], str]]]:
    """Experts as one tensor for each matrix of their layer; all else as it is."""
    counts: dict[tuple[str, str], int] = {}
    for name in stored:
        if found := _EXPERT.match(name):
            key = found["owner"].replace(".block_sparse_moe.", ".mlp."), found["part"]
            counts[key] = counts.get(key, 0) + 1
    seen: set[str] = set()
    for name, (shape, dtype) in stored.items():
        found = _EXPERT.match(name)
        if found is None:
            yield name.replace(".block_sparse_moe.", ".mlp."), (shape, dtype)
            continue
        owner = found["owner"].replace(".block_sparse_moe.", ".mlp.")
        is_down = found["part"] in _DOWN
        merged = f"{owner}.{'down_proj' if is_down else 'gate_up_proj'}"
        if merged not in seen:
            seen.add(merged)
            rows = shape[0] if is_down else 2 * shape[0]
            yield merged, ((counts[owner, found["part"]], rows, *shape[1:]), dtype)
