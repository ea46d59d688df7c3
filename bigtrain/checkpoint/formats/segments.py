"""Flat vectors that are stored in pieces, and where a tensor's elements lie in them."""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from bigtrain.checkpoint.index import Extent, Extents


class Segment(NamedTuple):
    """A stored vector that is a part of a longer one, from its element `start` on."""

    start: int
    numel: int
    file: int
    offset: int
    itemsize: int


def extents_in(segments: Sequence[Segment], *, at: int, numel: int, start: int) -> Iterator[Extent]:
    """Where elements [at, at + numel) of the long vector lie, as those of a tensor from `start`."""
    first = max(0, bisect_right(segments, at, key=lambda segment: segment.start) - 1)
    for segment in segments[first:]:
        if segment.start >= at + numel:
            return
        low = max(at, segment.start)
        high = min(at + numel, segment.start + segment.numel)
        if low < high:
            yield Extent(
                file=segment.file,
                offset=segment.offset + (low - segment.start) * segment.itemsize,
                start=start + low - at,
                run=high - low,
            )


class EqualVectors:
    """A vector of each rank, all in segments of the same lengths: thousands of ranks at once."""

    def __init__(self, vectors: Sequence[Sequence[Segment]]) -> None:
        self._segments = vectors[0]
        self._files = [
            array("q", (segment.file for segment in rank)) for rank in zip(*vectors, strict=True)
        ]
        self._offsets = [
            array("q", (segment.offset for segment in rank)) for rank in zip(*vectors, strict=True)
        ]

    @classmethod
    def of(cls, vectors: Sequence[Sequence[Segment]]) -> EqualVectors | None:
        """These, where they are alike."""
        lengths = {tuple((s.start, s.numel, s.itemsize) for s in rank) for rank in vectors}
        return cls(vectors) if len(lengths) == 1 and vectors[0] else None

    def extents(self, *, at: int, share: int, numel: int) -> Extents | None:
        """Of a tensor that is cut over the ranks, a `share` of each from element `at` on; None
        where a share is not in one segment."""
        place = bisect_right(self._segments, at, key=lambda segment: segment.start) - 1
        segment = self._segments[max(0, place)]
        if not numel or not segment.start <= at <= at + share <= segment.start + segment.numel:
            return None
        starts = array("q", range(0, numel, share))
        count = len(starts)
        runs = array("q", [share]) * (count - 1)
        runs.append(numel - (count - 1) * share)
        skip = (at - segment.start) * segment.itemsize
        offsets = array("q", [offset + skip for offset in self._offsets[place][:count]])
        return Extents.of_single_runs(
            file=self._files[place][:count], offset=offsets, start=starts, run=runs
        )
