"""What a consolidation did, and how far it is."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bigtrain.checkpoint.staging import readable_size


@dataclass(frozen=True, kw_only=True)
class Moved:
    """How far a consolidation is."""

    done_bytes: int
    total_bytes: int
    seconds: float

    @property
    def bytes_per_s(self) -> float:
        return self.done_bytes / self.seconds if self.seconds else 0.0

    @property
    def eta_s(self) -> float | None:
        if not self.done_bytes:
            return None
        return (self.total_bytes - self.done_bytes) / self.bytes_per_s


@dataclass(frozen=True, kw_only=True)
class FileSummary:
    """One file of weights that was written."""

    name: str
    nbytes: int
    xxh3: str
    """xxh3-128 of the whole file."""
    tensors: dict[str, str]
    """xxh3-128 of each tensor's bytes."""


@dataclass(frozen=True, kw_only=True)
class Summary:
    """What was read, what was written, and what is known of both."""

    source: Path
    kind: str
    """What the source is, in words."""
    step: int | None
    output: Path
    files: tuple[FileSummary, ...]
    side_files: tuple[str, ...]
    seconds: float
    source_checked: str
    """Which checksums of the source were checked, in words."""
    verified: bool
    """Whether the output was read back and compared."""
    source_removed: bool = False
    overflowed: dict[str, int] = field(default_factory=dict)
    """Tensors in which finite values became infinite in the new precision, and how many."""
    warnings: tuple[str, ...] = ()

    @property
    def tensors(self) -> int:
        return sum(len(file.tensors) for file in self.files)

    @property
    def nbytes(self) -> int:
        return sum(file.nbytes for file in self.files)

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        document = asdict(self)
        document.update(
            source=str(self.source),
            output=str(self.output),
            num_tensors=self.tensors,
            nbytes=self.nbytes,
        )
        return document

    def lines(self) -> list[str]:
        """For a person to read."""
        step = "" if self.step is None else f", step {self.step}"
        rate = self.nbytes / self.seconds / 1e6 if self.seconds else 0.0
        text = [
            f"{self.source}: {self.kind}{step}",
            f"{self.output}: {self.tensors} tensors, {readable_size(self.nbytes, digits=2)} "
            f"in {self.seconds:.1f} s ({rate:.0f} MB/s)",
            *(f"  {file.name}  {file.nbytes:,} bytes  xxh3 {file.xxh3}" for file in self.files),
            f"source: {self.source_checked}",
            "output: on the disk" + (", read back and compared" if self.verified else ""),
        ]
        if self.source_removed:
            text.append(f"removed: {self.source}")
        return text + [f"warning: {warning}" for warning in self.warnings]
