"""What is written: which tensors go into which file, and at which byte. Pure."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from bigtrain.checkpoint.consolidate.frames import Frame, OutputTensor, SafetensorsFrame
from bigtrain.checkpoint.consolidate.torch_zip import TorchFrame
from bigtrain.errors import ConfigError

_SIZE = re.compile(r"^(\d+(?:\.\d+)?)\s*([KMGT]?)(I?)B?$", re.IGNORECASE)
_POWERS = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}


@dataclass(frozen=True, kw_only=True)
class OutputFile:
    """One file of weights: the tensors in the order of their bytes, and what surrounds them."""

    name: str
    tensors: tuple[OutputTensor, ...]
    frame: Frame

    @property
    def nbytes(self) -> int:
        return self.frame.nbytes


@dataclass(frozen=True, kw_only=True)
class Format:
    """How a model's files are named and framed."""

    stem: str
    suffix: str
    make_frame: Callable[[Sequence[OutputTensor]], Frame]

    def file_name(self, number: int, count: int) -> str:
        """`model.safetensors`, or `model-00001-of-00002.safetensors` where there are more."""
        part = "" if count == 1 else f"-{number:05d}-of-{count:05d}"
        return f"{self.stem}{part}.{self.suffix}"

    @property
    def index_name(self) -> str:
        return f"{self.stem}.{self.suffix}.index.json"


SAFETENSORS = "safetensors"
TORCH = "torch"
_FORMATS = {
    SAFETENSORS: Format(stem="model", suffix="safetensors", make_frame=SafetensorsFrame),
    TORCH: Format(stem="pytorch_model", suffix="bin", make_frame=TorchFrame),
}
_ADAPTER_STEM = "adapter_model"


def output_format(name: str, *, is_adapter: bool = False) -> Format:
    """The format of that name; adapters have a name of their own, under which PEFT looks."""
    if name not in _FORMATS:
        raise ConfigError(f"format is {name!r}; it must be {' or '.join(_FORMATS)}")
    found = _FORMATS[name]
    return replace(found, stem=_ADAPTER_STEM) if is_adapter else found


def parse_size(size: int | str) -> int:
    """Bytes, from a number or from words such as `5GB` (10⁹) or `5GiB` (2³⁰)."""
    if isinstance(size, str):
        match = _SIZE.match(size.strip())
        if match is None:
            raise ConfigError(f"max_shard_size is {size!r}; write it as 5GB, 500MB or 4GiB")
        base = 1024 if match[3] else 1000
        # Of more digits than a float can have: no limit is what is meant.
        size = int(min(sys.maxsize, float(match[1]) * base ** _POWERS[match[2].upper()]))
    if size < 1:
        raise ConfigError(f"max_shard_size is {size} bytes; it must be at least 1")
    return size


def plan_files(
    tensors: Sequence[OutputTensor], *, max_shard_size: int, form: Format
) -> list[OutputFile]:
    """The tensors in files of at most that many bytes of tensors (one larger tensor aside)."""
    shards = list(_cut(tensors, max_shard_size))
    return [
        _plan_file(form.file_name(number, len(shards)), shard, form)
        for number, shard in enumerate(shards, start=1)
    ]


def index_json(files: Sequence[OutputFile]) -> bytes:
    """The index of a model in several files, as transformers writes it."""
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


def _plan_file(name: str, tensors: Sequence[OutputTensor], form: Format) -> OutputFile:
    # The widest elements first, so that all tensors are aligned to theirs.
    ordered = tuple(sorted(tensors, key=lambda tensor: -tensor.dtype.itemsize))
    return OutputFile(name=name, tensors=ordered, frame=form.make_frame(ordered))
