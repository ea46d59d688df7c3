from __future__ import annotations

import tracemalloc
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from bigtrain.checkpoint.dtypes import DTYPES
from bigtrain.checkpoint.index import Extent, Extents, TensorEntry, TensorIndex, merge, tiling_fault
from bigtrain.errors import CheckpointError


def entry(runs: Sequence[tuple[int, int]], *, shape: tuple[int, ...] = (10,)) -> TensorEntry:
    extents = [Extent(file=0, offset=4 * start, start=start, run=run) for start, run in runs]
    return TensorEntry(
        name="w", kind="weight", shape=shape, dtype=DTYPES["float32"], extents=Extents(extents)
    )


@pytest.mark.parametrize(
    ("runs", "shape", "fault"),
    [
        ([(0, 10)], (10,), None),
        ([(6, 4), (0, 6)], (2, 5), None),
        ([(0, 1)], (), None),
        ([], (0, 3), None),
        ([(0, 4), (6, 4)], (10,), "weight of w: elements 4 to 6 are missing"),
        ([(0, 6), (4, 6)], (10,), "weight of w: elements 4 to 6 are stored twice"),
        ([(0, 9)], (10,), "weight of w: elements 9 to 10 are missing"),
        ([(0, 11)], (10,), "weight of w: elements 10 to 11 are past its end"),
        ([(1, 9)], (10,), "weight of w: elements 0 to 1 are missing"),
        ([], (), "weight of w: elements 0 to 1 are missing"),
    ],
)
def test_tiling_names_the_first_gap_or_overlap(
    runs: list[tuple[int, int]], shape: tuple[int, ...], fault: str | None
) -> None:
    assert tiling_fault(entry(runs, shape=shape)) == fault


def test_check_tiling_lists_all_tensors_that_are_incomplete() -> None:
    index = TensorIndex(
        files=(Path("f"),),
        entries={
            ("w", "weight"): entry([(0, 9)]),
            ("w", "exp_avg"): replace(entry([(1, 9)]), kind="exp_avg"),
        },
    )
    with pytest.raises(CheckpointError) as caught:
        index.check_tiling()
    assert str(caught.value) == (
        "the checkpoint is incomplete:\n"
        "  weight of w: elements 9 to 10 are missing\n"
        "  exp_avg of w: elements 0 to 1 are missing"
    )


def test_only_the_extents_that_overlap_a_range_are_given() -> None:
    extents = entry([(0, 4), (4, 2), (6, 4)]).extents
    starts = [[e.start for e in extents.overlapping(a, b)] for a, b in [(0, 10), (3, 5), (6, 7)]]
    assert starts == [[0, 4, 6], [0, 4], [6]]
    assert list(extents.overlapping(4, 4)) == []


def test_a_container_is_opened_only_for_the_extent_that_is_asked_for() -> None:
    opened: list[tuple[int, int]] = []

    def locate(file: int, offset: int) -> int:
        opened.append((file, offset))
        return offset + 1000

    rows = [Extent(file=0, offset=100 * i, start=i, run=1, skip=3) for i in range(5)]
    extents = Extents(rows, locate=locate)
    assert [e.offset for e in extents.overlapping(2, 4)] == [1203, 1303]
    assert opened == [(0, 200), (0, 300)]


def test_merging_keeps_files_apart_and_refuses_a_tensor_twice() -> None:
    first = TensorIndex(files=(Path("a"),), entries={("v", "weight"): entry([(0, 10)])})
    second = TensorIndex(files=(Path("b"),), entries={("w", "weight"): entry([(0, 10)])})
    merged = merge([first, second])
    assert merged.files[merged.entry("w", "weight").extents[0].file] == Path("b")
    with pytest.raises(CheckpointError, match="weight of w is stored twice"):
        merge([second, second])


def test_a_missing_tensor_is_told_with_what_there_is() -> None:
    index = TensorIndex(files=(Path("a"),), entries={("w", "weight"): entry([(0, 10)])})
    with pytest.raises(CheckpointError, match=r"no exp_avg of w; of that name it has: weight$"):
        index.entry("w", "exp_avg")
    with pytest.raises(CheckpointError, match=r"no weight of x; of that name it has: nothing$"):
        index.entry("x", "weight")


def columns(*, rows: int, width: int, cuts: Sequence[int]) -> TensorEntry:
    """A matrix cut by columns at `cuts`."""
    extents = [
        Extent(0, 0, low, high - low, rows, width, 4 * (high - low))
        for low, high in zip((0, *cuts), (*cuts, width), strict=True)
    ]
    return replace(entry([], shape=(rows, width)), extents=Extents(extents[::-1]))


def test_columns_tile_and_what_they_lack_or_have_twice_is_named() -> None:
    whole = columns(rows=3, width=8, cuts=(2, 5))
    assert tiling_fault(whole) is None
    rows = list(whole.extents)
    lacking = replace(whole, extents=Extents(rows[:2]))
    assert tiling_fault(lacking) == "weight of w: elements 5 to 8 are missing"
    twice = replace(whole, extents=Extents([*rows, rows[0]]))
    assert tiling_fault(twice) == "weight of w: elements 0 to 2 are stored twice"
    shorter = [rows[0], rows[1], rows[2]._replace(runs=2)]
    fault = tiling_fault(replace(whole, extents=Extents(shorter)))
    assert fault == "weight of w: elements 21 to 24 are missing"
    longer = replace(whole, shape=(2, 8))
    assert tiling_fault(longer) == "weight of w: elements 16 to 24 are past its end"


def test_the_memory_of_a_tiling_does_not_grow_with_the_rows() -> None:
    large = columns(rows=10**10, width=2048, cuts=range(128, 2048, 128))
    tracemalloc.start()
    assert tiling_fault(large) is None
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1 << 20
