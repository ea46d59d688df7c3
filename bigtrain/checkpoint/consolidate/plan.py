"""What a consolidation will do, decided before the first byte is written."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import xxhash

from bigtrain.checkpoint.consolidate.adapter_config import (
    ADAPTER_CONFIG,
    NO_BIASES,
    read_adapter_config,
    trained_biases,
)
from bigtrain.checkpoint.consolidate.adapters import (
    adapter_tensors,
    is_adapter,
    is_whole,
    merged_tensors,
)
from bigtrain.checkpoint.consolidate.casting import target_dtype
from bigtrain.checkpoint.consolidate.frames import LowRank, OutputTensor
from bigtrain.checkpoint.consolidate.layout import (
    SAFETENSORS,
    OutputFile,
    output_format,
    plan_files,
)
from bigtrain.checkpoint.consolidate.naming import AUTO, plain_names
from bigtrain.checkpoint.consolidate.request import Request
from bigtrain.checkpoint.consolidate.side_files import (
    CONFIG,
    find_side_files,
    read_config,
    ties_embeddings,
    with_dtype,
)
from bigtrain.checkpoint.formats.torch_state_dict import read_other_sets
from bigtrain.checkpoint.index import WEIGHT, TensorEntry, TensorIndex
from bigtrain.checkpoint.source import MODEL, Source, open_source, with_base
from bigtrain.errors import CheckpointError

_RESERVED = "__metadata__"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The files to write, and what goes beside them."""

    source: Source
    request: Request
    files: tuple[OutputFile, ...]
    index_name: str
    side_files: dict[str, Path]
    config: dict[str, Any]
    warnings: tuple[str, ...]
    leaves_out: bool
    """Whether the source has trained weights that the output lacks."""

    @property
    def nbytes(self) -> int:
        """Of the files of weights."""
        return sum(file.nbytes for file in self.files)

    @property
    def side_bytes(self) -> int:
        return sum(path.stat().st_size for path in self.side_files.values())

    def fingerprint(self) -> str:
        """The same for an attempt that may go on where another one stopped."""
        stats = [(str(path), path.stat()) for path in self.source.index.files if path.exists()]
        identity = [
            [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats],
            [(file.name, file.frame.header.hex()) for file in self.files],
            repr(self.request.of_the_output),
            [_origin(tensor) for file in self.files for tensor in file.tensors],
        ]
        return xxhash.xxh3_128_hexdigest(json.dumps(identity).encode())


def make_plan(source: Source, request: Request) -> Plan:
    """Which tensors of the source go where, by which names, in which precision.

    CheckpointError where the source lacks what is asked for, or two tensors would get one name.
    """
    source = _with_other_sets(source, request.weights)
    content = _content(source, request)
    config = read_config(content.side_files)
    warnings = []
    needed, reader = (ADAPTER_CONFIG, "PEFT") if content.is_adapter else (CONFIG, "from_pretrained")
    if needed not in content.side_files:
        warnings.append(f"there is no {needed} beside the weights; {reader} needs one")
    tensors = [
        OutputTensor(
            name=name, entry=entry, dtype=target_dtype(request.dtype, entry.dtype), update=update
        )
        for name, (entry, update) in content.tensors.items()
    ]
    form = output_format(request.format, is_adapter=content.is_adapter)
    if request.format == SAFETENSORS and _RESERVED in content.tensors:
        raise CheckpointError(
            f"{source.path}: a tensor is named {_RESERVED}, under which safetensors files keep "
            "what isn't one; use --format torch"
        )
    # PEFT knows no adapters in several files.
    limit = sys.maxsize if content.is_adapter else request.most_bytes
    return Plan(
        source=content.source,
        request=request,
        files=tuple(plan_files(tensors, max_shard_size=limit, form=form)),
        index_name=form.index_name,
        side_files=content.side_files,
        config=with_dtype(config, _main_dtype(tensors)) if tensors else config,
        warnings=tuple(warnings),
        leaves_out=content.is_adapter and len(content.tensors) < len(source.sets[request.weights]),
    )


def _with_other_sets(source: Source, chosen: str) -> Source:
    """The source, with the averages that a state dict's files may hold beside the model."""
    files = source.index.files
    if any(file.suffix != ".bin" for file in files):
        return source
    others = read_other_sets(files, chosen=chosen)
    if MODEL in others:
        raise CheckpointError(
            f"{source.path}: holds two sets of weights, and both are its model (state_dict, "
            "model); save the one that is meant alone"
        )
    index = source.index
    if chosen in others:
        entries = {(name, WEIGHT): entry for name, entry in others[chosen].items()}
        index = TensorIndex(files=files, entries=entries)
        index.check_tiling()
    return replace(source, index=index, sets={**source.sets, **others})


def _origin(tensor: OutputTensor) -> Sequence[object]:
    """What the tensor's bytes are made of."""
    stored, update = [tensor.entry.name, tensor.entry.kind], tensor.update
    if update is None:
        return stored
    return [*stored, update.a.name, update.b.name, update.scaling, update.is_transposed]


@dataclass(frozen=True, kw_only=True)
class _Content:
    """What goes into the output."""

    source: Source
    tensors: Mapping[str, tuple[TensorEntry, LowRank | None]]
    side_files: dict[str, Path]
    is_adapter: bool = False


def _content(source: Source, request: Request) -> _Content:
    if request.weights not in source.sets:
        raise CheckpointError(
            f"{source.path} has no weights named {request.weights!r}; it has: "
            f"{', '.join(source.sets)}"
        )
    side_files = find_side_files(source.path)
    tied = ties_embeddings(read_config(side_files))
    named = _named(source, source.sets[request.weights], request.prefix, tied=tied)
    if not is_adapter(named, has_config=ADAPTER_CONFIG in side_files):
        if request.merge_adapter:
            raise CheckpointError(f"{source.path} holds no LoRA adapter to merge")
        plain = {name: (entry, None) for name, entry in named.items()}
        return _Content(source=source, tensors=plain, side_files=side_files)
    if request.merge_adapter:
        return _merged(source, named, side_files)
    side_files.pop(CONFIG, None)
    whole = is_whole(named)
    biases = trained_biases(side_files.get(ADAPTER_CONFIG)) if whole else NO_BIASES
    adapter = {k: (entry, None) for k, entry in adapter_tensors(named, biases=biases).items()}
    return _Content(source=source, tensors=adapter, side_files=side_files, is_adapter=True)


def _merged(
    source: Source, named: Mapping[str, TensorEntry], side_files: dict[str, Path]
) -> _Content:
    whole = is_whole(named)
    config = read_adapter_config(side_files.pop(ADAPTER_CONFIG, None), has_base=whole)
    base: Mapping[str, TensorEntry] = {}
    if not whole:
        where = Path(config.get("base_model_name_or_path") or "")
        if not where.name or not where.is_dir():
            raise CheckpointError(
                f"{source.path} holds the adapter alone, and its model {str(where)!r} is no "
                f"directory here; download it, and name it in {ADAPTER_CONFIG} "
                "(base_model_name_or_path)"
            )
        source, base = with_base(source, open_source(where))
        side_files = {**find_side_files(where), **side_files}
    tensors = merged_tensors(named, base, config)
    return _Content(source=source, tensors=tensors, side_files=side_files)


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
    if source.has_plain_names and prefix == AUTO:
        prefix = ""
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
