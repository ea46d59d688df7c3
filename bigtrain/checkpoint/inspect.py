"""What a checkpoint is and holds: in lines for people, in plain values for programs. No torch.

It takes whatever `source.open_source` and `foreign.read_foreign` take, ours also while it is
still being written. No tensor is loaded; verifying and comparing stream.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from bigtrain.checkpoint import foreign
from bigtrain.checkpoint.blocks import FilePool
from bigtrain.checkpoint.compare import element_of
from bigtrain.checkpoint.formats.committed import read_committed
from bigtrain.checkpoint.formats.transformers_dir import NamesNeededError
from bigtrain.checkpoint.index import TensorIndex, tiling_fault
from bigtrain.checkpoint.manifest import (
    MALFORMED,
    MANIFEST,
    PARTS,
    Manifest,
    Part,
    Progress,
    read_manifest,
    read_parts,
)
from bigtrain.checkpoint.node_view import own_ranks, seen_from
from bigtrain.checkpoint.source import open_source
from bigtrain.checkpoint.staging import readable_size
from bigtrain.checkpoint.verify import find_faults, require_whole_zip
from bigtrain.checkpoint.witness import Record, RecordSource, no_records, record_holds
from bigtrain.errors import CheckpointError

_SMALL = ("scheduler.*", "scaler.*", "rng_state*.pth", "random_states_*.pkl")


@dataclass(frozen=True, kw_only=True)
class Fault:
    """Something that is not as it should be, and what it spoils."""

    path: Path
    message: str
    tensors: tuple[str, ...] = ()
    """The tensors that have elements there."""


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """What was found."""

    path: Path
    engine: str
    world_size: int | None
    progress: Progress
    created: str | None
    versions: Mapping[str, str]
    index: TensorIndex
    is_committed: bool
    """False while it is being written, and of what was never finished."""
    manifest: Manifest | None = None
    parts: tuple[Part, ...] = ()
    find_record: RecordSource = field(default=no_records, repr=False)
    ranks_missing: tuple[int, ...] = ()
    """Ranks that haven't said yet what they wrote."""
    passed_over: tuple[tuple[Path, str], ...] = ()
    """Newer ones in the directory that was asked for, which can't be used, and why."""

    @property
    def step(self) -> int | None:
        """Steps done; None where others' files don't say."""
        return self.progress.step if self.progress.step or self.manifest else self._steps_counted()

    @property
    def epoch(self) -> float | None:
        """Epochs done; None where others' files don't say."""
        return self.progress.epoch if self.progress.epoch or self.manifest else None

    def _steps_counted(self) -> int | None:
        """As the optimizer counts its own."""
        for group in self.index.param_groups or ():
            if isinstance(group.get("step"), (int, float)):
                return int(group["step"])
        counted = next((e for e in self.index.entries.values() if e.kind == "step"), None)
        if counted is None or counted.numel != 1:
            return None
        with contextlib.closing(FilePool(find_record=None)) as pool:
            value = element_of(self.index, counted, pool)
        return None if value is None else int(value)

    def sizes(self) -> dict[str, int]:
        """Bytes of all tensors of each kind."""
        sizes: dict[str, int] = {}
        for entry in self.index.entries.values():
            sizes[entry.kind] = sizes.get(entry.kind, 0) + entry.nbytes
        return sizes


def inspect_checkpoint(path: Path) -> Inspection:
    """What `path` is, or the newest checkpoint in it; raises CheckpointError when it is none."""
    if (path / MANIFEST).is_file():
        manifest = read_manifest(path)
        return _own(path, manifest, read_parts(path, manifest=manifest))
    if (path / PARTS).is_dir():
        return _unfinished(path)
    if foreign.is_foreign(path):
        return _foreign(path)
    source = open_source(path)
    step = source.path if source.is_own else _step_of_others(path, source.path)
    if step is not None:
        return replace(inspect_checkpoint(step), passed_over=source.passed_over)
    return Inspection(
        path=source.path,
        engine=source.kind,
        world_size=None,
        progress=Progress(step=source.step or 0),
        created=None,
        versions={},
        index=source.index,
        is_committed=True,
        find_record=source.find_record,
        passed_over=source.passed_over,
    )


def _step_of_others(directory: Path, found: Path) -> Path | None:
    """What below `directory` holds `found` and the optimizer's state of its step."""
    below = [found, *found.parents]
    inside = below[: below.index(directory)] if directory in below else []
    return next((path for path in reversed(inside) if foreign.is_foreign(path)), None)


def verify(found: Inspection) -> Iterator[Fault]:
    """Check every stored hash or checksum, and that the elements of all tensors are there once.

    What was passed over on the way to this checkpoint is a fault, too.
    """
    for path, why in found.passed_over:
        yield Fault(path=path, message=f"{path}: passed over: {why}")
    if not found.is_committed:
        yield Fault(path=found.path, message=f"{found.path}: was never committed")
    if found.parts:
        own = own_ranks(found.manifest) if found.manifest else None
        here = [part for part in found.parts if own is None or part.rank in own]
        for damage in find_faults(found.path, here, deep=True):
            yield Fault(
                path=damage.path,
                message=damage.message,
                tensors=tuple(_tensors_in(found.index, damage.path)),
            )
    else:
        yield from _verify_records(found)
        yield from _verify_small(found.path)
    for entry in found.index.entries.values():
        fault = tiling_fault(entry)
        if fault is not None:
            yield Fault(path=found.path, message=fault, tensors=(f"{entry.name} ({entry.kind})",))


def describe(found: Inspection, *, all_tensors: bool = False) -> Iterator[str]:
    """Lines for people."""
    state = "" if found.is_committed else "  (not committed: still being written, or given up)"
    yield f"{found.path}{state}"
    ranks = f" on {_count(found.world_size, 'rank')}" if found.world_size else ""
    yield f"  written by   {found.engine}{ranks}"
    progress = found.progress
    samples = f", {progress.samples_seen:,} samples seen" if progress.samples_seen else ""
    step = "unknown" if found.step is None else f"{found.step:,}"
    epoch = "" if found.epoch is None else f" (epoch {found.epoch:.3g}{samples})"
    yield f"  step         {step}{epoch}"
    for older, why in found.passed_over:
        yield f"  passed over  {older}: {why}"
    if found.created:
        yield f"  created      {found.created}"
    if found.versions:
        yield "  versions     " + ", ".join(f"{name} {v}" for name, v in found.versions.items())
    if found.ranks_missing:
        yield f"  missing      the shares of {_count(len(found.ranks_missing), 'rank')}"
    for kind, nbytes in found.sizes().items():
        entries = [entry for entry in found.index.entries.values() if entry.kind == kind]
        numel = sum(entry.numel for entry in entries)
        dtypes = ", ".join(sorted({entry.dtype.name for entry in entries}))
        count = f"{len(entries):,} tensors, {numel:,} elements of {dtypes}"
        yield f"  {kind:<12} {count}, {_size(nbytes)}"
    for number, group in enumerate(found.index.param_groups or ()):
        values = ", ".join(f"{k}={v}" for k, v in group.items() if k != "params" and v is not None)
        yield f"  group {number}      {len(group['params']):,} parameters: {values}"
    if all_tensors:
        yield from (f"  {line}" for line in _tensor_lines(found.index))


def as_values(found: Inspection) -> dict[str, Any]:
    """The same for programs, ready for JSON."""
    return {
        "path": str(found.path),
        "engine": found.engine,
        "world_size": found.world_size,
        "step": found.step,
        "epoch": found.epoch,
        "samples_seen": found.progress.samples_seen if found.manifest else None,
        "created": found.created,
        "committed": found.is_committed,
        "passed_over": [{"path": str(path), "why": why} for path, why in found.passed_over],
        "versions": dict(found.versions),
        "param_groups": [_plain(group) for group in found.index.param_groups or ()],
        "tensors": [
            {
                "name": entry.name,
                "kind": entry.kind,
                "shape": list(entry.shape),
                "dtype": entry.dtype.name,
                "pieces": len(entry.extents),
                "bytes": entry.nbytes,
            }
            for entry in found.index.entries.values()
        ],
    }


def _own(path: Path, manifest: Manifest, parts: Sequence[Part]) -> Inspection:
    return Inspection(
        path=path,
        engine=manifest.engine,
        world_size=manifest.world_size,
        progress=manifest.progress,
        created=manifest.created,
        versions=manifest.versions,
        index=read_committed(path, manifest=manifest, parts=seen_from(manifest, parts)),
        is_committed=True,
        manifest=manifest,
        parts=tuple(parts),
    )


def _unfinished(path: Path) -> Inspection:
    """Ours, without its manifest: what the ranks have said so far."""
    parts = []
    for file in sorted((path / PARTS).glob("rank-*.json")):
        try:
            parts.append(Part.from_bytes(file.read_bytes()))
        except (OSError, *MALFORMED):
            continue  # renamed away, or damaged: then it is missing
    index = read_committed(path, manifest=None, parts=parts)
    ranks = {part.rank for part in parts}
    return Inspection(
        path=path,
        engine="bigtrain",
        world_size=None,
        progress=Progress(step=0),
        created=None,
        versions={},
        index=index,
        is_committed=False,
        parts=tuple(parts),
        ranks_missing=tuple(rank for rank in range(max(ranks, default=0) + 1) if rank not in ranks),
    )


def _foreign(path: Path) -> Inspection:
    try:
        found = foreign.read_foreign(path)
    except NamesNeededError:
        found = foreign.read_foreign(path, names=foreign.numbers_as_names(path))
    return Inspection(
        path=path,
        engine=found.engine,
        world_size=found.world_size,
        progress=found.progress,
        created=None,
        versions={},
        index=found.index,
        is_committed=True,
        find_record=found.find_record,
    )


def _verify_records(found: Inspection) -> Iterator[Fault]:
    """The checksums that the format itself has: those of all bytes that any tensor lies in."""
    seen: set[tuple[Path, Record]] = set()
    for entry in found.index.entries.values():
        for extent in entry.extents:
            path = found.index.files[extent.file]
            record = found.find_record(path, extent.offset)
            if record is None or not record.is_checked or (path, record) in seen:
                continue
            seen.add((path, record))
            if not record_holds(path, record):
                yield Fault(
                    path=path,
                    message=(
                        f"{path}: bytes {record.start} to {record.stop} are not those that were "
                        "written (their checksum differs)"
                    ),
                    tensors=tuple(_tensors_in(found.index, path, record.start, record.stop)),
                )


def _verify_small(checkpoint: Path) -> Iterator[Fault]:
    """The checksums of others' files without tensors of the index, from which training goes on."""
    for pattern in _SMALL:
        for path in sorted(checkpoint.glob(pattern)):
            try:
                require_whole_zip(path)
            except CheckpointError as fault:
                yield Fault(path=path, message=str(fault))


def _tensors_in(
    index: TensorIndex, path: Path, start: int = 0, stop: int | None = None
) -> Iterator[str]:
    if path not in index.files:
        return
    file = index.files.index(path)
    for entry in index.entries.values():
        for extent in entry.extents:
            if extent.file == file and (stop is None or start <= extent.offset < stop):
                yield f"{entry.name} ({entry.kind})"
                break


def _tensor_lines(index: TensorIndex) -> Iterator[str]:
    for entry in index.entries.values():
        shape = "×".join(map(str, entry.shape)) or "scalar"
        where = _count(len(entry.extents), "piece")
        size = _size(entry.nbytes)
        yield f"{entry.name}  {entry.kind}  {entry.dtype.name}  {shape}  {size}  {where}"


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    return value if isinstance(value, (bool, int, float, str, type(None))) else repr(value)


def _count(count: int, what: str) -> str:
    return f"{count:,} {what}" if count == 1 else f"{count:,} {what}s"


def _size(count: int) -> str:
    return readable_size(count, digits=2)
