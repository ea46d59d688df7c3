"""What a consolidation is asked for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from bigtrain.checkpoint.consolidate.casting import KEEP, check_choice
from bigtrain.checkpoint.consolidate.layout import SAFETENSORS, output_format, parse_size
from bigtrain.checkpoint.consolidate.naming import AUTO
from bigtrain.checkpoint.consolidate.summary import Moved
from bigtrain.checkpoint.source import MODEL
from bigtrain.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Request:
    """The arguments of `bigtrain.consolidate`, which says what they mean. ConfigError for values
    that can't be meant."""

    source: Path
    output: Path
    step: int | None = None
    weights: str = MODEL
    dtype: str = KEEP
    max_shard_size: int | str = "5GB"
    prefix: str = AUTO
    format: str = SAFETENSORS
    merge_adapter: bool = False
    jobs: int | None = None
    verify: bool = False
    resume: bool = False
    remove_source: bool = False
    trust_times: bool = False
    progress: Callable[[Moved], None] | None = None

    def __post_init__(self) -> None:
        check_choice(self.dtype)
        output_format(self.format)
        parse_size(self.max_shard_size)
        if self.jobs is not None and self.jobs < 1:
            raise ConfigError(f"jobs is {self.jobs}; it must be at least 1")

    @property
    def is_verified(self) -> bool:
        """Whether the output is read back: always where the source goes afterwards."""
        return self.verify or self.remove_source

    @property
    def most_bytes(self) -> int:
        """Of one file."""
        return parse_size(self.max_shard_size)

    @property
    def of_the_output(self) -> tuple[object, ...]:
        """All that decides which bytes are written."""
        return (
            self.weights,
            self.dtype,
            self.most_bytes,
            self.prefix,
            self.format,
            self.merge_adapter,
        )
