"""What a checkpoint is and holds: in lines for people, in plain values for programs. No torch.

It takes whatever `source.open_source` and `foreign.read_foreign` take, ours also while it is
still being written. No tensor is loaded; verifying and comparing stream.
"""

from __future__ import annotations

import math
import struct
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bigtrain.checkpoint import foreign
from bigtrain.checkpoint.blocks import FilePool
from bigtrain.checkpoint.elements import read_elements
from bigtrain.checkpoint.formats.committed import read_committed
from bigtrain.checkpoint.index import BUFFER, WEIGHT, TensorEntry, TensorIndex, tiling_fault
from bigtrain.checkpoint.manifest import (
    MANIFEST,
    PARTS,
    Manifest,
    Part,
    Progress,
    read_manifest,
    read_parts,
)
from bigtrain.checkpoint.source import open_source
from bigtrain.checkpoint.verify import find_faults
from bigtrain.checkpoint.witness import Record, RecordSource, no_records, record_holds
from bigtrain.errors import CheckpointError

_CHUNK_ELEMENTS = 1 << 18
"""Compared at a time."""


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
    if source.is_own:
        return inspect_checkpoint(source.path)
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
    )


def verify(found: Inspection) -> Iterator[Fault]:
    """Check every stored hash or checksum, and that the elements of all tensors are there once."""
    if found.manifest is not None:
        for damage in find_faults(found.path, found.parts, deep=True):
            yield Fault(
                path=damage.path,
                message=damage.message,
                tensors=tuple(_tensors_in(found.index, damage.path)),
            )
    else:
        yield from _verify_records(found)
    for entry in found.index.entries.values():
        fault = tiling_fault(entry)
        if fault is not None:
            yield Fault(path=found.path, message=fault, tensors=(f"{entry.name} ({entry.kind})",))


@dataclass(frozen=True, kw_only=True)
class Difference:
    """How one tensor differs between two checkpoints."""

    name: str
    kind: str
    what: str
    """In words."""
    largest: float | None = None
    """Absolute; of elements that can be compared as numbers."""
    count: int | None = None
    """Elements that differ."""


def differences(ours: Inspection, theirs: Inspection) -> Iterator[Difference]:
    """The tensors that are not the same in both, with how far apart they are."""
    mine, others = ours.index.entries, theirs.index.entries
    pools = FilePool(find_record=None), FilePool(find_record=None)
    try:
        for key in sorted(mine.keys() | _known(others, mine)):
            name, kind = key
            first, second = mine.get(key), _entry(others, key)
            if first is None or second is None:
                only = ours.path if second is None else theirs.path
                yield Difference(name=name, kind=kind, what=f"only in {only}")
            elif first.shape != second.shape:
                yield Difference(name=name, kind=kind, what=f"{first.shape} and {second.shape}")
            else:
                yield from _compare(first, second, (ours.index, theirs.index), pools)
    finally:
        for pool in pools:
            pool.close()


def describe(found: Inspection, *, all_tensors: bool = False) -> Iterator[str]:
    """Lines for people."""
    state = "" if found.is_committed else "  (not committed: still being written, or given up)"
    yield f"{found.path}{state}"
    ranks = f" on {found.world_size} ranks" if found.world_size else ""
    yield f"  written by   {found.engine}{ranks}"
    progress = found.progress
    samples = f", {progress.samples_seen:,} samples seen" if progress.samples_seen else ""
    yield f"  step         {progress.step:,} (epoch {progress.epoch:.3g}{samples})"
    if found.created:
        yield f"  created      {found.created}"
    if found.versions:
        yield "  versions     " + ", ".join(f"{name} {v}" for name, v in found.versions.items())
    if found.ranks_missing:
        yield f"  missing      the shares of {len(found.ranks_missing)} ranks"
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
        "step": found.progress.step,
        "epoch": found.progress.epoch,
        "samples_seen": found.progress.samples_seen,
        "created": found.created,
        "committed": found.is_committed,
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
        index=read_committed(path, manifest=manifest, parts=parts),
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
        except (OSError, ValueError, KeyError):
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
    except CheckpointError as fault:
        if "does not name them" not in str(fault):
            raise
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


def _known(
    others: Mapping[tuple[str, str], TensorEntry], mine: Mapping[tuple[str, str], TensorEntry]
) -> set[tuple[str, str]]:
    """Keys of the others', with buffers under the kind that they have here."""
    return {
        (name, BUFFER) if kind == WEIGHT and (name, BUFFER) in mine else (name, kind)
        for name, kind in others
    }


def _entry(
    entries: Mapping[tuple[str, str], TensorEntry], key: tuple[str, str]
) -> TensorEntry | None:
    name, kind = key
    if key not in entries and kind in (WEIGHT, BUFFER):
        return entries.get((name, WEIGHT)) or entries.get((name, BUFFER))
    return entries.get(key)


def _compare(
    first: TensorEntry,
    second: TensorEntry,
    indexes: tuple[TensorIndex, TensorIndex],
    pools: tuple[FilePool, FilePool],
) -> Iterator[Difference]:
    count, largest = 0, 0.0
    for start in range(0, first.numel, _CHUNK_ELEMENTS):
        length = min(_CHUNK_ELEMENTS, first.numel - start)
        chunks = []
        for entry, index, pool in zip((first, second), indexes, pools, strict=True):
            out = bytearray(length * entry.dtype.itemsize)
            read_elements(index, entry, pool, start=start, out=memoryview(out))
            chunks.append(out)
        if first.dtype == second.dtype and chunks[0] == chunks[1]:
            continue
        mine = _numbers(chunks[0], first.dtype.name)
        theirs = _numbers(chunks[1], second.dtype.name)
        if mine is None or theirs is None:
            count += sum(a != b for a, b in zip(chunks[0], chunks[1], strict=False))
            continue
        for a, b in zip(mine, theirs, strict=True):
            if a != b and not (math.isnan(a) and math.isnan(b)):
                count += 1
                largest = max(largest, abs(a - b))
    if count or first.dtype != second.dtype:
        types = {first.dtype.name, second.dtype.name}
        what = "differs" if len(types) == 1 else f"{first.dtype.name} and {second.dtype.name}"
        yield Difference(name=first.name, kind=first.kind, what=what, largest=largest, count=count)


_FORMATS = {"float32": "f", "float64": "d", "int64": "q", "int32": "i", "uint8": "B", "int8": "b"}


def _numbers(data: bytearray, dtype: str) -> Sequence[float] | None:
    """The elements as numbers; None of types that Python has none for."""
    if dtype in _FORMATS:
        values = array(_FORMATS[dtype])
        values.frombytes(bytes(data))
        return values
    if dtype == "float16":
        return struct.unpack(f"<{len(data) // 2}e", data)
    if dtype == "bfloat16":
        wide = bytearray(2 * len(data))
        wide[2::4], wide[3::4] = data[0::2], data[1::2]
        return _numbers(wide, "float32")
    return None


def _tensor_lines(index: TensorIndex) -> Iterator[str]:
    for entry in index.entries.values():
        shape = "×".join(map(str, entry.shape)) or "scalar"
        pieces = len(entry.extents)
        where = f"{pieces} pieces" if pieces != 1 else "1 piece"
        size = _size(entry.nbytes)
        yield f"{entry.name}  {entry.kind}  {entry.dtype.name}  {shape}  {size}  {where}"


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    return value if isinstance(value, (bool, int, float, str, type(None))) else repr(value)


def _size(count: int) -> str:
    size, unit = float(count), "bytes"
    for larger in ("KB", "MB", "GB", "TB"):
        if size < 1000:
            break
        size, unit = size / 1000, larger
    return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.2f} {unit}"
