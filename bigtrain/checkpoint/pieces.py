"""What one rank contributes to a checkpoint: names, numbers and memory. No torch.

A `Share` is all that writing takes. It can be handed to another process together with the memory
in which its pieces lie.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from bigtrain.checkpoint.dtypes import DType
from bigtrain.checkpoint.index import BUFFER, WEIGHT
from bigtrain.checkpoint.manifest import Layout

MODEL_KINDS = (WEIGHT, BUFFER)


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Neighbouring elements of a flattened named tensor, from `start` on."""

    name: str
    kind: str
    dtype: DType
    shape: tuple[int, ...]
    """Of the whole tensor."""
    start: int
    data: memoryview

    @property
    def numel(self) -> int:
        return self.data.nbytes // self.dtype.itemsize


@dataclass(frozen=True, kw_only=True)
class GroupField:
    """One hyperparameter of one of the optimizer's groups, as torch stores it in DCP."""

    group: int
    name: str
    content: bytes
    """What `torch.save` made of it."""


@dataclass(frozen=True, kw_only=True)
class OptimizerFile:
    """What `optimizer.pt` takes beside the pieces: its pickle, which names storages by number."""

    pickle: bytes
    pieces: tuple[int, ...]
    """The piece that storage 0, 1, … is."""


@dataclass(frozen=True, kw_only=True)
class Share:
    """All that one rank writes."""

    layout: Layout
    rank: int
    is_head: bool
    """Whether it also writes what a checkpoint holds once."""
    pieces: tuple[Piece, ...]
    has_optimizer: bool
    group_fields: tuple[GroupField, ...] = ()
    """Sharded layout, the head."""
    optimizer: OptimizerFile | None = None
    """Whole layout, the head."""
    objects: Mapping[str, bytes] = field(default_factory=dict)
    """Content of small files, by path relative to the checkpoint."""
    caller_files: tuple[str, ...] = ()
    """What the caller has put into the staging, by path relative to it; the head."""
