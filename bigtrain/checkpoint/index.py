"""Which bytes of which files hold which elements of which tensor, for every checkpoint format.

    TensorIndex ── (name, kind) ──> TensorEntry: shape, dtype, Extents ──> Extent, Extent, …

Each format's reader produces one `TensorIndex` without loading a tensor. Loading, consolidating
and verifying are then the same few lines over extents. Extents are kept in columns of machine
integers, because a large run's checkpoint has millions.
"""

from __future__ import annotations

import heapq
import math
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, islice
from operator import le
from pathlib import Path
from typing import Any, NamedTuple

from bigtrain.checkpoint.dtypes import DType
from bigtrain.checkpoint.inert import unfolds
from bigtrain.errors import CheckpointError

WEIGHT = "weight"
BUFFER = "buffer"
# Every other kind is the optimizer's own name for a state: "exp_avg", "exp_avg_sq", "step", …


class Extent(NamedTuple):
    """`runs` runs of `run` neighbouring elements each.

    Run k holds the elements from `start + k * stride` on of the flattened tensor, and its bytes
    begin at `offset + k * file_stride` of the file. Nearly always there is one run.
    """

    file: int
    """Which of the index's files."""
    offset: int
    start: int
    run: int
    runs: int = 1
    stride: int = 0
    file_stride: int = 0
    skip: int = 0
    """Bytes to add to `offset`, where that names a container that was not opened yet."""
    axes: tuple[tuple[int, int], ...] = ()
    """Of a single run whose elements are no neighbours in the file, but an array of these sizes,
    with steps in bytes. Its row-major order is that of the run."""

    @property
    def numel(self) -> int:
        return self.run * self.runs


class Extents(Sequence[Extent]):
    """A tensor's extents as columns, sorted by `start`.

    Some formats name only the container that holds an extent's bytes. `locate(file, offset)`
    then gives the place of the first byte, when it is asked for: a rank that reads one extent of
    a thousand opens one container.
    """

    def __init__(
        self,
        extents: Iterable[Extent] = (),
        *,
        locate: Callable[[int, int], int] | None = None,
    ) -> None:
        rows = sorted(extents, key=lambda extent: extent.start)
        *numbers, axes = zip(*rows, strict=True) if rows else [()]
        self._columns: Sequence[Sequence[Any]] = (
            *(array("q", column) for column in numbers),
            axes if any(axes) else _Same((), len(rows)),
        )
        self._length = len(rows)
        self._locate = locate

    @classmethod
    def of_single_runs(
        cls,
        *,
        file: array[int],
        offset: array[int],
        start: array[int],
        run: array[int],
        locate: Callable[[int, int], int] | None = None,
    ) -> Extents:
        """Extents of one run each, by columns."""
        columns = [file, offset, start, run]
        if not all(map(le, start, islice(start, 1, None))):
            order = sorted(range(len(start)), key=start.__getitem__)
            columns = [array("q", map(column.__getitem__, order)) for column in columns]
        extents = cls(locate=locate)
        extents._length = len(start)
        once, none = _Same(1, len(start)), _Same(0, len(start))
        extents._columns = (*columns, once, none, none, none, _Same((), len(start)))
        return extents

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, position: Any) -> Any:
        if isinstance(position, slice):
            return [self[i] for i in range(*position.indices(self._length))]
        if not -self._length <= position < self._length:
            raise IndexError(position)
        return self._located(self.unlocated(position))

    def unlocated(self, position: int) -> Extent:
        """The extent as the format names it: cheap, but `offset` may be its container's."""
        return Extent(*(column[position] for column in self._columns))

    def renumbered(self, *, by: int) -> Extents:
        """The same extents in an index that has `by` other files before theirs."""
        locate = self._locate
        rows = map(self.unlocated, range(self._length))
        return Extents(
            (row._replace(file=row.file + by) for row in rows),
            locate=None if locate is None else lambda file, offset: locate(file - by, offset),
        )

    def _located(self, row: Extent) -> Extent:
        offset = row.offset if self._locate is None else self._locate(row.file, row.offset)
        return row._replace(offset=offset + row.skip, skip=0)

    def overlapping(self, start: int, stop: int) -> Iterator[Extent]:
        """The extents that may hold elements of [start, stop), in order."""
        if not self._length or stop <= start:
            return
        starts = self._columns[Extent._fields.index("start")]
        # Extents of several runs reach past their successors' starts, so look from the front.
        first = 0 if self.is_interleaved else max(0, bisect_right(starts, start) - 1)
        for position in range(first, bisect_right(starts, stop - 1)):
            row = self.unlocated(position)
            if row.start + (row.runs - 1) * row.stride + row.run > start:
                yield self._located(row)

    @property
    def is_interleaved(self) -> bool:
        """Whether any extent has more than one run."""
        if not self._length:
            return False
        runs = self._columns[Extent._fields.index("runs")]
        return not isinstance(runs, _Same) and max(runs) > 1

    @property
    def is_strided(self) -> bool:
        """Whether any extent is an array in another order than the file's."""
        return self._length > 0 and not isinstance(self._columns[-1], _Same)

    def tiles(self, numel: int) -> bool:
        """Whether extents of one run each hold `numel` elements, each of them once, in order."""
        if not self._length:
            return numel == 0
        starts, runs = (self._columns[Extent._fields.index(name)] for name in ("start", "run"))
        ends = array("q", accumulate(runs))
        return ends[-1] == numel and starts[0] == 0 and ends[:-1] == starts[1:]


class _Same(Sequence[Any]):
    """A column of one value."""

    def __init__(self, value: Any, length: int) -> None:
        self._value, self._length = value, length

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, position: Any) -> Any:
        return self._value


@dataclass(frozen=True, kw_only=True)
class TensorEntry:
    """One tensor of a checkpoint."""

    name: str
    """As in the unwrapped model's `named_parameters()`."""
    kind: str
    shape: tuple[int, ...]
    dtype: DType
    extents: Extents

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize


@dataclass(frozen=True, kw_only=True)
class TensorIndex:
    """All tensors of a checkpoint, and where they lie."""

    files: tuple[Path, ...]
    entries: Mapping[tuple[str, str], TensorEntry]
    param_groups: tuple[Mapping[str, Any], ...] | None = None
    """The optimizer's groups, with `params` as names; None: weights only."""
    by_name: Mapping[str, tuple[str, ...]] = field(init=False, repr=False, compare=False)
    """The kinds that there are of each name."""

    def __post_init__(self) -> None:
        kinds: dict[str, list[str]] = {}
        for name, kind in self.entries:
            kinds.setdefault(name, []).append(kind)
        frozen = {name: tuple(of_name) for name, of_name in kinds.items()}
        object.__setattr__(self, "by_name", frozen)
        for group in self.param_groups or ():
            if unfolds([value for key, value in group.items() if key != "params"]):
                raise CheckpointError("the optimizer's options are no plain values")
            if not isinstance(group.get("params"), (list, tuple)):
                raise CheckpointError("a group of the optimizer's doesn't say its parameters")

    def entry(self, name: str, kind: str) -> TensorEntry:
        """The tensor, or an error that says what there is of that name."""
        try:
            return self.entries[name, kind]
        except KeyError:
            kinds = ", ".join(self.by_name.get(name, ())) or "nothing"
            raise CheckpointError(
                f"the checkpoint has no {kind} of {name}; of that name it has: {kinds}"
            ) from None

    def check_tiling(self) -> None:
        """Raise unless the extents of every tensor cover it with no gap and no overlap."""
        faults = [fault for entry in self.entries.values() if (fault := tiling_fault(entry))]
        if faults:
            shown = faults[:10] + ([f"… and {len(faults) - 10} more"] if faults[10:] else [])
            raise CheckpointError("the checkpoint is incomplete:\n  " + "\n  ".join(shown))


def merge(indexes: Sequence[TensorIndex]) -> TensorIndex:
    """One index over all of them; the names must not meet."""
    files: list[Path] = []
    entries: dict[tuple[str, str], TensorEntry] = {}
    groups: tuple[Mapping[str, Any], ...] | None = None
    for index in indexes:
        for key, entry in index.entries.items():
            if key in entries:
                raise CheckpointError(f"the {entry.kind} of {entry.name} is stored twice")
            entries[key] = replace(entry, extents=entry.extents.renumbered(by=len(files)))
        files.extend(index.files)
        groups = index.param_groups if index.param_groups is not None else groups
    return TensorIndex(files=tuple(files), entries=entries, param_groups=groups)


def tiling_fault(entry: TensorEntry) -> str | None:
    """What is wrong with how the extents cover the tensor; None when they tile it exactly."""
    is_interleaved = entry.extents.is_interleaved
    if not is_interleaved and entry.extents.tiles(entry.numel):
        return None
    runs: Iterable[tuple[int, int]] = _runs(entry.extents)
    if is_interleaved:
        runs = _in_order(entry.extents)
    reached = 0
    for start, length in runs:
        if length == 0:
            continue
        if start > reached:
            return f"{entry.kind} of {entry.name}: elements {reached} to {start} are missing"
        if start < reached:
            twice = min(reached, start + length)
            return f"{entry.kind} of {entry.name}: elements {start} to {twice} are stored twice"
        reached += length
    if reached != entry.numel:
        what = "are missing" if reached < entry.numel else "are past its end"
        low, high = sorted((reached, entry.numel))
        return f"{entry.kind} of {entry.name}: elements {low} to {high} {what}"
    return None


def _in_order(extents: Extents) -> Iterable[tuple[int, int]]:
    """All runs by their starts. Of columns that lie side by side there are as many as the tensor
    has rows, so whole sets of them count as one."""
    rows = [extents.unlocated(position) for position in range(len(extents))]
    blocks = _blocks(rows)
    if blocks is not None:
        return sorted(blocks)
    return heapq.merge(*map(_runs_of, rows))


def _blocks(rows: Sequence[Extent]) -> list[tuple[int, int]] | None:
    """What extents of equal steps cover together; None where they leave gaps, or overlap."""
    alike: dict[tuple[int, int], list[Extent]] = {}
    found: list[tuple[int, int]] = []
    for row in rows:
        if row.runs == 1:
            found.append((row.start, row.run))
        else:
            alike.setdefault((row.runs, row.stride), []).append(row)
    for (runs, stride), columns in alike.items():
        width = begin = 0
        for row in sorted(columns, key=lambda row: row.start):
            begin = begin if width else row.start
            if row.start != begin + width or width + row.run > stride:
                return None
            width += row.run
            if width == stride:
                found.append((begin, runs * stride))
                width = 0
        if width:
            return None
    return found


def _runs(extents: Extents) -> Iterator[tuple[int, int]]:
    for position in range(len(extents)):
        yield from _runs_of(extents.unlocated(position))


def _runs_of(row: Extent) -> Iterator[tuple[int, int]]:
    for k in range(row.runs):
        yield row.start + k * row.stride, row.run
