"""JSON of which nothing is known yet."""

from __future__ import annotations

import json
from collections.abc import Sequence
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
    try:
        names = set(json_object(index.read_bytes())["weight_map"].values())
        outside = [name for name in names if Path(name).name != name]
    except (ValueError, KeyError, TypeError, AttributeError) as fault:
        raise CheckpointError(f"{index}: not an index of weights; it is damaged") from fault
    if outside:
        raise CheckpointError(f"{index}: names files outside of its directory: {outside}")
    return [index.parent / name for name in sorted(names)]
