"""Opens a committed checkpoint, for any engine at any world size.

Nothing is loaded when it is opened. A rank then reads the bytes of its own shard, whatever layout,
engine and number of ranks wrote them, and checks the blocks that it touches. No pickle is run, but
for the small files with the scheduler's, scaler's and random state: these by torch's own
`weights_only` loader, after their hash was checked.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bigtrain.checkpoint.blocks import FilePool
from bigtrain.checkpoint.elements import read_elements
from bigtrain.checkpoint.find import require_checkpoint
from bigtrain.checkpoint.index import TensorEntry, TensorIndex
from bigtrain.checkpoint.manifest import Manifest, Progress
from bigtrain.checkpoint.snapshot import rng_name
from bigtrain.checkpoint.verify import verify_checkpoint
from bigtrain.errors import CheckpointError
from bigtrain.topology import RankInfo

_TILE_BYTES = 16 << 20
"""Of the buffer through which elements go that must be cast or moved to a device."""


class IndexedSource:
    """A `StateSource` over a tensor index."""

    def __init__(self, index: TensorIndex, pool: FilePool) -> None:
        self._index = index
        self._pool = pool

    @property
    def param_groups(self) -> Sequence[Mapping[str, Any]] | None:
        """The optimizer's groups, with `params` as names; None: weights only."""
        return self._index.param_groups

    def kinds(self, name: str) -> Mapping[str, torch.dtype]:
        """What there is of a tensor; empty when it is unknown."""
        return {
            kind: _torch_dtype(self._index.entry(name, kind))
            for kind in self._index.by_name.get(name, ())
        }

    def shape(self, name: str, kind: str) -> tuple[int, ...]:
        """The whole tensor's shape."""
        return self._index.entry(name, kind).shape

    def read_into(self, name: str, kind: str, start: int, out: Tensor) -> None:
        """Fill the 1-D `out` with elements [start, start + out.numel()), cast to its dtype."""
        entry = self._index.entry(name, kind)
        if out.dim() != 1 or start < 0 or start + out.numel() > entry.numel:
            raise CheckpointError(
                f"{kind} of {name} has {entry.numel} elements (shape {entry.shape}); the model "
                f"here asks for {start} to {start + out.numel()}: it is another model"
            )
        target = out.detach()
        is_direct = target.device.type == "cpu" and target.is_contiguous()
        if is_direct and target.dtype == _torch_dtype(entry):
            self._read(entry, start, target)
        else:
            self._read_through_tile(entry, start, target)

    def _read_through_tile(self, entry: TensorEntry, start: int, out: Tensor) -> None:
        length = max(1, min(out.numel(), _TILE_BYTES // entry.dtype.itemsize))
        tile = torch.empty(length, dtype=_torch_dtype(entry))
        for begin in range(0, out.numel(), length):
            piece = tile[: min(length, out.numel() - begin)]
            self._read(entry, start + begin, piece)
            out[begin : begin + piece.numel()].copy_(piece)

    def _read(self, entry: TensorEntry, start: int, out: Tensor) -> None:
        if out.numel():
            view = out.view(torch.uint8).numpy().data
            read_elements(self._index, entry, self._pool, start=start, out=view)


class LoadedCheckpoint:
    """A checkpoint that was verified and can be read. Close it when it was."""

    def __init__(
        self, path: Path, *, manifest: Manifest, index: TensorIndex, pool: FilePool
    ) -> None:
        self.path = path
        self.manifest = manifest
        self.index = index
        self.source = IndexedSource(index, pool)
        self._pool = pool

    @property
    def progress(self) -> Progress:
        """How far the training had come."""
        return self.manifest.progress

    @property
    def engine(self) -> str:
        """The engine that wrote it."""
        return self.manifest.engine

    @property
    def world_size(self) -> int:
        """How many ranks wrote it."""
        return self.manifest.world_size

    def scheduler_state(self) -> dict[str, Any] | None:
        """The scheduler's state dict; None where none was saved."""
        state: dict[str, Any] | None = self._load("scheduler.pt")
        return state

    def scaler_state(self) -> dict[str, Any]:
        """The loss scaler's plain values; empty without fp16."""
        return self._load("scaler.pt") or {}

    def rng_state(self, rank: int) -> dict[str, Any] | None:
        """The random state that this rank had; None where that many ranks did not write."""
        if rank >= self.world_size:
            return None
        world = RankInfo(rank=rank, world_size=self.world_size)
        state: dict[str, Any] | None = self._load(rng_name(self.manifest.layout, world))
        return state

    def close(self) -> None:
        """Close its files. Safe to call twice."""
        self._pool.close()

    def __enter__(self) -> LoadedCheckpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _load(self, name: str) -> Any:
        path = self.path / name
        if not self._pool.knows(path):
            return None
        reader = self._pool.reader(path)
        content = io.BytesIO(reader.read(0, reader.size))
        with torch.serialization.safe_globals(_numpy_globals()):
            return torch.load(content, map_location="cpu", weights_only=True)


def open_checkpoint(path: Path) -> LoadedCheckpoint:
    """The checkpoint at `path`, verified but for the large files, which are as they are read.

    Each rank may call alone. Files from which training doesn't go on (config, tokenizer) may have
    been edited since, and only give a warning. Raises CheckpointError.
    """
    verified = verify_checkpoint(require_checkpoint(path), lenient=True)
    return LoadedCheckpoint(
        path,
        manifest=verified.manifest,
        index=verified.index,
        pool=FilePool(verified.digests),
    )


def _torch_dtype(entry: TensorEntry) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, entry.dtype.name)
    return dtype


def _numpy_globals() -> list[Any]:
    """What the pickle of numpy's random state names: transformers' files hold it as it is."""
    import numpy

    core = numpy._core if hasattr(numpy, "_core") else numpy.core
    reconstruct = core.multiarray._reconstruct
    return [reconstruct, numpy.ndarray, numpy.dtype, type(numpy.dtype(numpy.uint32))]
