"""What is written: which tensors go into which file, and at which byte. Pure."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bigtrain.checkpoint.dtypes import DType
from bigtrain.checkpoint.formats.safetensors import header_bytes
from bigtrain.checkpoint.index import TensorEntry
from bigtrain.errors import CheckpointError, ConfigError

_SIZE = re.compile(r"^(\d+(?:\.\d+)?)\s*([KMGT]?)(I?)B?$", re.IGNORECASE)
_POWERS = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}


@dataclass(frozen=True, kw_only=True)
class OutputTensor:
    """One tensor of the output."""

    name: str
    entry: TensorEntry
    dtype: DType

    @property
    def nbytes(self) -> int:
        return self.entry.numel * self.dtype.itemsize


@dataclass(frozen=True, kw_only=True)
class OutputFile:
    """One safetensors file: a header, then the tensors' bytes without gaps."""

    name: str
    tensors: tuple[OutputTensor, ...]
    header: bytes

    @property
    def nbytes(self) -> int:
        return len(self.header) + sum(tensor.nbytes for tensor in self.tensors)


def parse_size(size: int | str) -> int:
    """Bytes, from a number or from words such as `5GB` (10⁹) or `5GiB` (2³⁰)."""
    if isinstance(size, str):
        match = _SIZE.match(size.strip())
        if match is None:
            raise ConfigError(f"max_shard_size is {size!r}; write it as 5GB, 500MB or 4GiB")
        base = 1024 if match[3] else 1000
        size = int(float(match[1]) * base ** _POWERS[match[2].upper()])
    if size < 1:
        raise ConfigError(f"max_shard_size is {size} bytes; it must be at least 1")
    return size


def plan_files(
    tensors: Sequence[OutputTensor], *, max_shard_size: int, stem: str = "model"
) -> list[OutputFile]:
    """The tensors in files of at most that many bytes of tensors (one larger tensor aside)."""
    shards = list(_cut(tensors, max_shard_size))
    return [
        _plan_file(_file_name(stem, number, len(shards)), shard)
        for number, shard in enumerate(shards, start=1)
    ]


def index_json(files: Sequence[OutputFile]) -> bytes:
    """`model.safetensors.index.json`, as transformers writes it."""
    total = sum(tensor.nbytes for file in files for tensor in file.tensors)
    names = {tensor.name: file.name for file in files for tensor in file.tensors}
    document: Mapping[str, Any] = {
        "metadata": {"total_size": total},
        "weight_map": dict(sorted(names.items())),
    }
    return json.dumps(document, indent=2).encode() + b"\n"


def _cut(tensors: Sequence[OutputTensor], most: int) -> Iterator[list[OutputTensor]]:
    shard: list[OutputTensor] = []
    size = 0
    for tensor in tensors:
        if shard and size + tensor.nbytes > most:
            yield shard
            shard, size = [], 0
        shard.append(tensor)
        size += tensor.nbytes
    yield shard


def _file_name(stem: str, number: int, count: int) -> str:
    return (
        f"{stem}.safetensors" if count == 1 else f"{stem}-{number:05d}-of-{count:05d}.safetensors"
    )


def _plan_file(name: str, tensors: Sequence[OutputTensor]) -> OutputFile:
    # The widest elements first, so that all tensors are aligned to theirs.
    ordered = sorted(tensors, key=lambda tensor: -tensor.dtype.itemsize)
    for tensor in ordered:
        if tensor.dtype.safetensors is None:
            raise CheckpointError(
                f"{tensor.name} is {tensor.dtype.name}, for which safetensors has no name"
            )
    header = header_bytes([(t.name, t.dtype, t.entry.shape) for t in ordered])
    return OutputFile(name=name, tensors=tuple(ordered), header=header)
