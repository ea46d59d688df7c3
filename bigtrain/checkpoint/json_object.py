"""JSON of which nothing is known yet."""

from __future__ import annotations

import json
from collections.abc import Container, Mapping, Sequence
from pathlib import Path
from typing import Any

from bigtrain.errors import CheckpointError


def json_object(data: bytes) -> dict[str, Any]:
    """The object that the text is; ValueError for anything else, however deep it is nested."""
    try:
        found = json.loads(data)
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    if not isinstance(found, dict):
        raise ValueError("it is no JSON object")
    return found


def counts(value: Any) -> tuple[int, ...]:
    """A list of numbers from zero on: a shape, or places in a file. ValueError for others."""
    if not isinstance(value, list) or any(type(each) is not int or each < 0 for each in value):
        raise ValueError(f"{value!r:.80} is no list of numbers from 0 on")
    return tuple(value)


def indexed_files(index: Path) -> Sequence[Path]:
    """The files beside it that an index of weights names."""
    names = set(_weight_map(index).values())
    outside = [name for name in names if Path(name).name != name]
    if outside:
        raise CheckpointError(f"{index}: names files outside of its directory: {outside}")
    return [index.parent / name for name in sorted(names)]


def check_indexed(index: Path, stored: Container[str]) -> None:
    """Raise unless all tensors that an index names are stored: another model's shard may lie
    under a shard's name."""
    absent = {name: file for name, file in _weight_map(index).items() if name not in stored}
    for name, file in absent.items():
        more = f" and {len(absent) - 1} more" if absent.keys() - {name} else ""
        raise CheckpointError(
            f"{index}: names {name} in {file}{more}, but no file holds it; the files don't belong "
            "together"
        )


def _weight_map(index: Path) -> Mapping[str, str]:
    """Tensor → file."""
    try:
        found = json_object(index.read_bytes())["weight_map"]
        if isinstance(found, dict) and all(isinstance(name, str) for name in found.values()):
            return found
    except (ValueError, KeyError) as fault:
        raise CheckpointError(f"{index}: not an index of weights; it is damaged") from fault
    raise CheckpointError(f"{index}: not an index of weights; it is damaged")
