"""The `data` section of a run file, as the rest of this package reads it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from bigtrain.errors import ConfigError

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

    def __post_init__(self) -> None:
        faults = _faults(self)
        if faults:
            raise ConfigError(faults)

    @classmethod
    def from_section(cls, section: Mapping[str, Any]) -> DataSettings:
        """The settings in a plan's `data`; its `cache_dir` is not one of them."""
        given = {key: value for key, value in section.items() if value is not None}
        given.pop("cache_dir", None)
        for key in ("train_files", "eval_files"):
            if key in given:
                value = given[key]
                given[key] = (value,) if isinstance(value, str) else tuple(value)
        if not given.get("sequence_length"):
            raise ConfigError("data.sequence_length is missing; give the tokens per sample")
        return cls(**given)


def _faults(settings: DataSettings) -> list[str]:
    faults = []
    if (settings.name is None) == (not settings.train_files):
        faults.append("data needs exactly one of `name` and `train_files`")
    if settings.sequence_length < 2:
        faults.append(f"data.sequence_length is {settings.sequence_length}; it must be at least 2")
    share = settings.eval_split
    if isinstance(share, float) and not 0 < share < 1:
        faults.append(f"data.eval_split is {share}; a share lies between 0 and 1")
    if isinstance(share, str) and settings.train_files:
        faults.append(
            f"data.eval_split is {share!r}, the name of a split, but data.train_files has no "
            "splits; give a share such as 0.05, or data.eval_files"
        )
    if share is not None and settings.eval_files:
        faults.append("data.eval_split and data.eval_files both say what to evaluate on; drop one")
    if settings.format is not None and settings.format not in FORMATS.values():
        known = ", ".join(sorted(set(FORMATS.values())))
        faults.append(f"data.format is {settings.format!r}; use {known}")
    return faults
