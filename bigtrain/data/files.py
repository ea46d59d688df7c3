"""Which files the `data` section names, and which columns they have, without reading them.

Nothing here needs more than the standard library, so that planning can ask before anything starts.
"""

from __future__ import annotations

import bz2
import csv
import difflib
import glob
import gzip
import json
import lzma
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TextIO

from bigtrain.data.settings import COMPRESSIONS, FORMATS
from bigtrain.errors import ConfigError, DataError
from bigtrain.paths import below

_LONGEST_HEADER = 1 << 16
_HEADER_LINES = 20
OPENERS: Mapping[str, Callable[..., TextIO]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
}
"""How to open what a suffix says is compressed."""


def format_of(path: Path) -> str:
    """The format that a file's suffix stands for."""
    suffixes = [suffix.lower() for suffix in path.suffixes if suffix not in COMPRESSIONS]
    kind = FORMATS.get(suffixes[-1] if suffixes else "")
    if kind is None:
        known = ", ".join(sorted(set(FORMATS.values())))
        raise ConfigError(
            f"{path}: its suffix names no format that can be read; set data.format to one of "
            f"{known}"
        )
    return kind


def matching(pattern: str, root: Path) -> list[Path]:
    """The files that a path or a glob names, sorted. DataError where there are none."""
    path = below(root, pattern, label="data")
    # First as it stands: a file's own name may hold brackets.
    if path.is_file():
        return [path]
    found = sorted(Path(match) for match in glob.glob(str(path), recursive=True))  # noqa: PTH207
    files = [match for match in found if match.is_file()]
    if not files:
        is_relative = path != Path(pattern) and not path.parent.is_dir()
        from_where = f"; relative paths start in {root}" if is_relative else ""
        raise DataError(f"{path} names no file; {_nearest(path)}{from_where}")
    return files


def _nearest(path: Path) -> str:
    folder = path.parent
    if not folder.is_dir():
        while not folder.is_dir() and folder != folder.parent:
            folder = folder.parent
        return f"the folder ends at {folder}"
    names = sorted(entry.name for entry in folder.iterdir())
    near = difflib.get_close_matches(path.name, names, n=3, cutoff=0.4)
    if near:
        return f"in {folder} there is {', '.join(near)}"
    return f"{folder} holds {len(names)} other entries"


def columns(path: Path, kind: str) -> list[str] | None:
    """The columns that a CSV's header or the first lines of JSON name; None where a look does not
    tell: another format, a line that is very long, what is no JSON object."""
    if kind not in ("csv", "json"):
        return None
    opener = OPENERS.get(path.suffix.lower(), open)
    try:
        with opener(path, "rt", encoding="utf-8") as file:
            text = file.read(_LONGEST_HEADER)
    except (OSError, EOFError, ValueError):
        return None
    lines = text.splitlines()
    if len(text) == _LONGEST_HEADER:
        lines.pop()  # cut off
    lines = lines[:_HEADER_LINES]
    return next(csv.reader(lines), None) if kind == "csv" else _keys(lines)


def _keys(lines: list[str]) -> list[str] | None:
    found: set[str] = set()
    for line in filter(str.strip, lines):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            return None
        if not isinstance(row, dict):
            return None
        found.update(row)
    return sorted(found) or None
