"""Opens a checkpoint for any engine at any world size, whoever wrote it.

Nothing is loaded when it is opened. A rank then reads the bytes of its own shard, whatever layout,
engine and number of ranks wrote them, and checks the blocks that it touches. No pickle is run, but
for the small files with the scheduler's, scaler's and random state: these by torch's own
`weights_only` loader, after their hash was checked.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bigtrain.checkpoint.agreement import attempt
from bigtrain.checkpoint.blocks import FilePool
from bigtrain.checkpoint.elements import read_elements
from bigtrain.checkpoint.find import require_checkpoint
from bigtrain.checkpoint.foreign import (
    ForeignCheckpoint,
    has_been_split,
    is_foreign,
    read_foreign,
    steps_of_groups,
)
from bigtrain.checkpoint.formats.transformers_dir import Names
from bigtrain.checkpoint.index import BUFFER, WEIGHT, TensorEntry, TensorIndex
from bigtrain.checkpoint.manifest import MANIFEST, Manifest, Progress
from bigtrain.checkpoint.snapshot import rng_name
from bigtrain.checkpoint.verify import require_whole_zip, verify_checkpoint
from bigtrain.engine.protocol import Engine
from bigtrain.errors import CheckpointError
from bigtrain.topology import RankInfo

_TILE_BYTES = 16 << 20
"""Of the buffer through which elements go that must be cast or moved to a device."""


class IndexedSource:
    """A `StateSource` over a tensor index.

    Bytes that are not what was written are an error at once; or, once `defers_faults`, remembered
    as `fault` and read as they are. Engines wait for each other while they load, so one that
    stopped in the middle would leave the others waiting.
    """

    def __init__(
        self,
        index: TensorIndex,
        pool: FilePool,
        *,
        aliases: Mapping[str, str] | None = None,
        scalars: Mapping[tuple[str, str], float] | None = None,
    ) -> None:
        self._index = index
        self._pool = pool
        self._aliases = aliases or {}
        self._scalars = scalars or {}
        self._scalar_names = {name for name, _ in self._scalars}
        self.defers_faults = False
        self.fault: CheckpointError | None = None

    @property
    def param_groups(self) -> Sequence[Mapping[str, Any]] | None:
        """The optimizer's groups, with `params` as names; None: weights only."""
        return self._index.param_groups

    def kinds(self, name: str) -> Mapping[str, torch.dtype]:
        """What there is of a tensor; empty when it is unknown."""
        name = self._stored_name(name)
        kinds = {
            kind: _torch_dtype(self._index.entry(name, kind))
            for kind in self._index.by_name.get(name, ())
        }
        if WEIGHT in kinds and BUFFER not in kinds:
            kinds[BUFFER] = kinds[WEIGHT]  # most formats don't tell them apart
        if name in self._scalar_names:
            kinds["step"] = torch.float32
        return kinds

    def shape(self, name: str, kind: str) -> tuple[int, ...]:
        """The whole tensor's shape."""
        if (self._stored_name(name), kind) in self._scalars:
            return ()
        return self._entry(name, kind).shape

    def read_into(self, name: str, kind: str, start: int, out: Tensor) -> None:
        """Fill the 1-D `out` with elements [start, start + out.numel()), cast to its dtype."""
        scalar = self._scalars.get((self._stored_name(name), kind))
        if scalar is not None:
            out.fill_(scalar)
            return
        entry = self._entry(name, kind)
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

    def _stored_name(self, name: str) -> str:
        return name if name in self._index.by_name else self._aliases.get(name, name)

    def _entry(self, name: str, kind: str) -> TensorEntry:
        name = self._stored_name(name)
        if kind == BUFFER and (name, BUFFER) not in self._index.entries:
            kind = WEIGHT
        return self._index.entry(name, kind)

    def _read_through_tile(self, entry: TensorEntry, start: int, out: Tensor) -> None:
        length = max(1, min(out.numel(), _TILE_BYTES // entry.dtype.itemsize))
        tile = torch.empty(length, dtype=_torch_dtype(entry))
        for begin in range(0, out.numel(), length):
            piece = tile[: min(length, out.numel() - begin)]
            self._read(entry, start + begin, piece)
            out[begin : begin + piece.numel()].copy_(piece)

    def _read(self, entry: TensorEntry, start: int, out: Tensor) -> None:
        if not out.numel():
            return
        view = out.view(torch.uint8).numpy().data
        try:
            read_elements(self._index, entry, self._pool, start=start, out=view)
        except CheckpointError as fault:
            if not self.defers_faults:
                raise
            self.fault = self.fault or fault


class LoadedCheckpoint:
    """A checkpoint that was verified and can be read. Close it when it was."""

    def __init__(
        self,
        path: Path,
        *,
        index: TensorIndex,
        pool: FilePool,
        manifest: Manifest | None = None,
        foreign: ForeignCheckpoint | None = None,
    ) -> None:
        self.path = path
        self.index = index
        self._manifest = manifest
        self._foreign = foreign
        self._pool = pool
        self.source = IndexedSource(
            index,
            pool,
            aliases=foreign.aliases if foreign else None,
            scalars=steps_of_groups(index) if foreign else None,
        )

    @property
    def is_own(self) -> bool:
        """Whether bigtrain wrote it."""
        return self._manifest is not None

    @property
    def manifest(self) -> Manifest:
        """What it says of itself, where bigtrain wrote it."""
        if self._manifest is None:
            raise CheckpointError(f"{self.path} has no {MANIFEST}: bigtrain did not write it")
        return self._manifest

    @property
    def run_id(self) -> str | None:
        """The run that wrote it; None of others' checkpoints."""
        return self._manifest.run_id if self._manifest else None

    @property
    def progress(self) -> Progress:
        """How far the training had come."""
        return self._known.progress

    @property
    def engine(self) -> str:
        """The engine that wrote it."""
        return self._known.engine

    @property
    def world_size(self) -> int:
        """How many ranks wrote it."""
        return self._known.world_size

    def scheduler_state(self) -> dict[str, Any] | None:
        """The scheduler's state dict; None where none was saved."""
        if self._foreign is not None:
            foreign: dict[str, Any] | None = self._load_foreign(self._foreign.scheduler)
            return foreign
        own: dict[str, Any] | None = self._load("scheduler.pt")
        return own

    def scaler_state(self) -> dict[str, Any]:
        """The loss scaler's plain values; empty without fp16."""
        if self._foreign is not None:
            return self._load_foreign(self.path / "scaler.pt") or {}
        return self._load("scaler.pt") or {}

    def rng_state(self, rank: int) -> dict[str, Any] | None:
        """The random state that this rank had; None where that many ranks did not write."""
        if rank >= self.world_size:
            return None
        if self._foreign is not None:
            return _as_transformers(self._load_foreign(self._foreign.random_state(rank)))
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

    @property
    def _known(self) -> Manifest | ForeignCheckpoint:
        known = self._manifest or self._foreign
        assert known is not None
        return known

    def _load(self, name: str) -> Any:
        path = self.path / name
        if not self._pool.knows(path):
            return None
        reader = self._pool.reader(path)
        return _load_small(io.BytesIO(reader.read(0, reader.size)))

    def _load_foreign(self, path: Path | None) -> Any:
        if path is None or not path.is_file():
            return None
        require_whole_zip(path)
        try:
            return _load_small(io.BytesIO(path.read_bytes()))
        except (pickle.UnpicklingError, RuntimeError, EOFError) as fault:
            raise CheckpointError(
                f"{path}: can't be loaded without running what it holds ({fault}); remove it to "
                "go on without it"
            ) from fault


def open_checkpoint(path: Path, *, names: Names | None = None) -> LoadedCheckpoint:
    """The checkpoint at `path`, verified but for the large files, which are as they are read.

    Each rank may call alone. Files from which training doesn't go on (config, tokenizer) may have
    been edited since, and only give a warning. `names` of the trained parameters, group by group,
    are needed for those formats of others that only number them. Raises CheckpointError.
    """
    is_ours = (path / MANIFEST).is_file() and not has_been_split(path)
    if not is_ours and is_foreign(path):
        foreign = read_foreign(path, names=names)
        pool = FilePool(find_record=foreign.find_record)
        return LoadedCheckpoint(path, index=foreign.index, pool=pool, foreign=foreign)
    verified = verify_checkpoint(require_checkpoint(path), lenient=True)
    return LoadedCheckpoint(
        path,
        manifest=verified.manifest,
        index=verified.index,
        pool=FilePool(verified.digests, absent=verified.elsewhere),
    )


def restore(
    engine: Engine, loaded: LoadedCheckpoint, *, world: RankInfo, optimizer: bool = True
) -> None:
    """Fill the engine. All ranks call; CheckpointError on all where any met damaged bytes.

    Afterwards the engine's state is whole, or after an error of no use: restore another one.
    """
    loaded.source.defers_faults = True

    def load() -> None:
        engine.load_local_state(loaded.source, optimizer=optimizer)
        if loaded.source.fault is not None:
            raise loaded.source.fault

    attempt(world, load)


def group_names(engine: Engine) -> list[list[str]]:
    """The names of the parameters that the engine trains, group by group."""
    return [list(group["params"]) for group in engine.param_groups()]


def _as_transformers(state: dict[str, Any] | None) -> dict[str, Any] | None:
    """accelerate's names for the generators, as transformers has them."""
    if state is None or "torch_manual_seed" not in state:
        return state
    named = {"python": "random_state", "numpy": "numpy_random_seed", "cpu": "torch_manual_seed"}
    found = {name: state[theirs] for name, theirs in named.items()}
    if "torch_cuda_manual_seed" in state:
        found["cuda"] = state["torch_cuda_manual_seed"]
    return found


def _load_small(content: io.BytesIO) -> Any:
    with torch.serialization.safe_globals(_numpy_globals()):
        return torch.load(content, map_location="cpu", weights_only=True)


def _torch_dtype(entry: TensorEntry) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, entry.dtype.name)
    return dtype


def _numpy_globals() -> list[Any]:
    """What the pickle of numpy's random state names: transformers' files hold it as it is."""
    import numpy

    core = numpy._core if hasattr(numpy, "_core") else numpy.core
    reconstruct = core.multiarray._reconstruct
    return [reconstruct, numpy.ndarray, numpy.dtype, type(numpy.dtype(numpy.uint32))]
