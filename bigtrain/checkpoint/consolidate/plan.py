"""What a consolidation will do, decided before the first byte is written."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from bigtrain.checkpoint.consolidate.casting import target_dtype
from bigtrain.checkpoint.consolidate.frames import OutputTensor
from bigtrain.checkpoint.consolidate.layout import OutputFile, output_format, plan_files
from bigtrain.checkpoint.consolidate.naming import is_adapter, plain_names, split_adapter
from bigtrain.checkpoint.consolidate.side_files import (
    CONFIG,
    find_side_files,
    read_config,
    ties_embeddings,
    with_dtype,
)
from bigtrain.checkpoint.index import TensorEntry
from bigtrain.checkpoint.source import Source
from bigtrain.errors import CheckpointError


@dataclass(frozen=True, kw_only=True)
class Choices:
    """What the user may choose of the output."""

    weights: str
    dtype: str
    limit: int
    """Bytes of one file."""
    prefix: str
    format: str


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The files to write, and what goes beside them."""

    source: Source
    choices: Choices
    files: tuple[OutputFile, ...]
    index_name: str
    side_files: dict[str, Path]
    config: dict[str, Any]
    warnings: tuple[str, ...]

    @property
    def nbytes(self) -> int:
        return sum(file.nbytes for file in self.files)

    def fingerprint(self) -> str:
        """The same for an attempt that may go on where another one stopped."""
        stats = [(str(path), path.stat()) for path in self.source.index.files if path.exists()]
        identity = [
            [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats],
            [(file.name, file.frame.header.hex()) for file in self.files],
            repr(self.choices),
        ]
        return xxhash.xxh3_128_hexdigest(json.dumps(identity).encode())


def make_plan(source: Source, choices: Choices) -> Plan:
    """Which tensors of the source go where, by which names, in which precision.

    CheckpointError where the source lacks what is asked for, or two tensors would get one name.
    """
    if choices.weights not in source.sets:
        raise CheckpointError(
            f"{source.path} has no weights named {choices.weights!r}; it has: "
            f"{', '.join(source.sets)}"
        )
    chosen = source.sets[choices.weights]
    side_files = find_side_files(source.path)
    config = read_config(side_files)
    warnings: list[str] = []
    adapted = is_adapter(chosen)
    if adapted:
        named = split_adapter(chosen)[1]
        config = {}
        side_files.pop(CONFIG, None)
        if "adapter_config.json" not in side_files:
            warnings.append("there is no adapter_config.json beside the adapter; PEFT needs one")
    else:
        named = _named(source, chosen, choices.prefix, tied=ties_embeddings(config))
        if not config:
            warnings.append("there is no config.json beside the weights; from_pretrained needs one")
    tensors = [
        OutputTensor(name=name, entry=entry, dtype=target_dtype(choices.dtype, entry.dtype))
        for name, entry in named.items()
    ]
    form = output_format(choices.format, is_adapter=adapted)
    return Plan(
        source=source,
        choices=choices,
        files=tuple(plan_files(tensors, max_shard_size=choices.limit, form=form)),
        index_name=form.index_name,
        side_files=side_files,
        config=with_dtype(config, _main_dtype(tensors)) if tensors else config,
        warnings=tuple(warnings),
    )


def _named(
    source: Source, chosen: Mapping[str, TensorEntry], prefix: str, *, tied: bool
) -> dict[str, TensorEntry]:
    """The tensors by their names in the output.

    A tied parameter's second name is left out where the configuration says that it is tied, as
    transformers does; else it becomes a copy, which any reader takes.
    """
    everything = dict(chosen)
    if not tied:
        for alias, owner in source.aliases.items():
            if owner in chosen and alias not in chosen:
                everything[alias] = chosen[owner]
    names = plain_names(
        [*everything, *(a for a in source.aliases if a not in everything)], prefix=prefix
    )
    return {names[name]: entry for name, entry in everything.items()}


def _main_dtype(tensors: Sequence[OutputTensor]) -> str:
    """The precision of most of the weights."""
    sizes: dict[str, int] = {}
    for tensor in tensors:
        if "float" in tensor.dtype.name:
            sizes[tensor.dtype.name] = sizes.get(tensor.dtype.name, 0) + tensor.entry.numel
    return max(sizes, key=lambda name: sizes[name]) if sizes else "float32"
