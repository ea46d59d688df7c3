"""safetensors: an eight-byte length, a JSON header, then the tensors' bytes.

https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bigtrain.checkpoint.dtypes import BY_SAFETENSORS, DType
from bigtrain.checkpoint.index import WEIGHT, Extent, Extents, TensorEntry, TensorIndex
from bigtrain.checkpoint.json_object import counts, json_object
from bigtrain.errors import CheckpointError

_HEADER_LIMIT = 100 << 20
"""The format's own."""
_LENGTH = struct.Struct("<Q")


def read_safetensors(paths: Sequence[Path]) -> TensorIndex:
    """The tensors of these files, all of kind weight: the format tells no buffers apart."""
    entries: dict[tuple[str, str], TensorEntry] = {}
    for number, path in enumerate(paths):
        header, begin = _read_header(path)
        size = path.stat().st_size
        places = []
        for name, fields in header.items():
            if name == "__metadata__":
                continue
            if (name, WEIGHT) in entries:
                raise CheckpointError(f"{path}: {name} is also in another file")
            place, entry = _read_entry(path, name, fields, file=number, begin=begin, size=size)
            entries[name, WEIGHT] = entry
            places.append((place, name))
        _check_gapless(path, places, size - begin)
    return TensorIndex(files=tuple(paths), entries=entries)


def header_bytes(tensors: Sequence[tuple[str, DType, tuple[int, ...]]]) -> bytes:
    """The beginning of a file in which these tensors' bytes follow in this order."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, dtype, shape in tensors:
        if dtype.safetensors is None:
            raise CheckpointError(f"{name} is {dtype.name}, for which safetensors has no name")
        end = at + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": dtype.safetensors, "shape": shape, "data_offsets": [at, end]}
        at = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return _LENGTH.pack(len(text)) + text


def _read_header(path: Path) -> tuple[Mapping[str, Any], int]:
    try:
        with path.open("rb") as file:
            (length,) = _LENGTH.unpack(file.read(_LENGTH.size))
            if length > _HEADER_LIMIT:
                raise ValueError(f"a header of {length} bytes")
            header = json_object(file.read(length))
    except OSError as fault:
        raise CheckpointError(f"{path}: can't be read: {fault.strerror}") from fault
    except (ValueError, struct.error) as fault:
        raise CheckpointError(
            f"{path}: not a safetensors file ({fault}); it is cut off or damaged"
        ) from fault
    return header, _LENGTH.size + length


def _read_entry(
    path: Path, name: str, fields: Any, *, file: int, begin: int, size: int
) -> tuple[tuple[int, int], TensorEntry]:
    try:
        dtype = BY_SAFETENSORS[fields["dtype"]]
        shape = counts(fields["shape"])
        first, last = counts(fields["data_offsets"])
    except (KeyError, TypeError, ValueError) as fault:
        raise CheckpointError(f"{path}: the header's entry of {name!r} is malformed") from fault
    numel = math.prod(shape)
    if last - first != numel * dtype.itemsize or begin + last > size:
        raise CheckpointError(
            f"{path}: {name} would lie at bytes {first} to {last} of {size - begin}, and takes "
            f"{numel * dtype.itemsize}; the file is cut off or damaged"
        )
    extents = [Extent(file=file, offset=begin + first, start=0, run=numel)] if numel else []
    entry = TensorEntry(name=name, kind=WEIGHT, shape=shape, dtype=dtype, extents=Extents(extents))
    return (first, last), entry


def _check_gapless(path: Path, places: list[tuple[tuple[int, int], str]], size: int) -> None:
    """Raise unless the tensors lie one behind the other up to the end, as the format has it."""
    reached = 0
    for (first, last), name in [*sorted(places), ((size, size), "the file's end")]:
        if first != reached:
            raise CheckpointError(
                f"{path}: the tensors before {name} end at byte {reached}, and not at {first}; "
                "the file is damaged"
            )
        reached = last
