"""The `data` section of a run file, as the rest of this package reads it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

FORMATS: Mapping[str, str] = {
    ".txt": "text",
    ".md": "text",
    ".jsonl": "json",
    ".json": "json",
    ".parquet": "parquet",
    ".csv": "csv",
}
"""Format by a file's suffix, where `data.format` does not say it."""

COMPRESSIONS = (".gz", ".bz2", ".xz")
"""Suffixes that are looked through: `corpus.jsonl.gz` is `json`."""


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """Where the documents come from, and what becomes of them."""

    sequence_length: int
    name: str | None = None
    """A dataset of the hub, a local folder that `datasets` knows, or `builtin:…`."""
    config_name: str | None = None
    train_files: tuple[str, ...] = ()
    """Paths and globs."""
    eval_files: tuple[str, ...] = ()
    format: str | None = None
    text_field: str = "text"
    eval_split: float | str | None = None
    """The share of the sequences, from their end, that is kept for evaluation; or the name of a
    split of `name`."""
    packing: bool = True
    """True: documents follow one another in full sequences. False: one sequence each, cut off."""
    max_samples: int | None = None
    """Read at most so many documents."""

    @classmethod
    def from_section(cls, section: Mapping[str, Any]) -> DataSettings:
        """The settings in a plan's `data`, which was checked when it was read (`DataSection`); its
        `cache_dir` is not one of them."""
        given = {key: value for key, value in section.items() if value is not None}
        given.pop("cache_dir", None)
        for key in ("train_files", "eval_files"):
            if key in given:
                value = given[key]
                given[key] = (value,) if isinstance(value, str) else tuple(value)
        return cls(**given)
