"""Flat ranges of a tensor as true-shaped boxes, boxes as flat runs. Pure arithmetic, no torch.

A box is (offsets, sizes), one number per dim. torch DCP stores boxes; an engine's shard is a
flat range, which is at most 2·ndim - 1 boxes, each of them contiguous in the flattened tensor.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from bigtrain.checkpoint.index import Extent


class Box(NamedTuple):
    """A part of a tensor, cut out along all of its dims."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.sizes)


def cut_range(shape: Sequence[int], start: int, stop: int) -> Iterator[Box]:
    """The boxes that elements [start, stop) of a tensor of `shape` make up, in flat order."""
    if stop <= start:
        return
    if not shape:
        yield Box((), ())
        return
    inner_shape = tuple(shape[1:])
    inner = math.prod(inner_shape)
    first, head = divmod(start, inner)
    last, tail = divmod(stop, inner)
    if first == last:
        yield from _in_row(first, cut_range(inner_shape, head, tail))
        return
    if head:
        yield from _in_row(first, cut_range(inner_shape, head, inner))
        first += 1
    if first < last:
        yield Box((first,) + (0,) * len(inner_shape), (last - first, *inner_shape))
    if tail:
        yield from _in_row(last, cut_range(inner_shape, 0, tail))


def _in_row(row: int, boxes: Iterator[Box]) -> Iterator[Box]:
    for box in boxes:
        yield Box((row, *box.offsets), (1, *box.sizes))


def contiguous_strides(sizes: Sequence[int]) -> tuple[int, ...]:
    """Strides in elements of a row-major tensor."""
    strides = [1]
    for size in reversed(sizes[1:]):
        strides.append(strides[-1] * size)
    return tuple(reversed(strides)) if sizes else ()


def box_extents(
    shape: Sequence[int],
    box: Box,
    *,
    file: int,
    offset: int,
    itemsize: int,
    file_strides: Sequence[int] | None = None,
) -> Iterator[Extent]:
    """Where a box that is stored at `offset` belongs in the flattened tensor of `shape`.

    `file_strides` are those of the stored elements, in elements; row-major where not given. A whole
    tensor is one extent, however its elements lie.
    `offset` is kept apart from what has to be skipped after it, as it may be a container's.
    """
    if box.numel == 0:
        return
    whole_rows = tuple(box.sizes[1:]) == tuple(shape[1:]) and not any(box.offsets[1:])
    if file_strides is None and shape and whole_rows:
        row = math.prod(shape[1:])
        yield Extent(file, offset, box.offsets[0] * row, box.sizes[0] * row)
        return
    outer = contiguous_strides(shape)
    inner = tuple(file_strides) if file_strides is not None else contiguous_strides(box.sizes)
    start = sum(at * stride for at, stride in zip(box.offsets, outer, strict=True))
    axes = _collapsed(box.sizes, outer, inner)
    array = tuple((size, stored * itemsize) for size, _, stored in axes)
    run = 1
    if axes and axes[-1][1:] == (1, 1):
        run = axes.pop()[0]
    runs, stride, file_stride = axes.pop() if axes else (1, 0, 0)
    if axes and box.sizes == tuple(shape):
        yield Extent(file, offset, 0, box.numel, axes=array)
        return
    for place in itertools.product(*(range(size) for size, _, _ in axes)):
        flat = sum(at * axis[1] for at, axis in zip(place, axes, strict=True))
        stored = sum(at * axis[2] for at, axis in zip(place, axes, strict=True))
        yield Extent(
            file=file,
            offset=offset,
            start=start + flat,
            run=run,
            runs=runs,
            stride=stride,
            file_stride=file_stride * itemsize,
            skip=stored * itemsize,
        )


def _collapsed(
    sizes: Sequence[int], outer: Sequence[int], inner: Sequence[int]
) -> list[tuple[int, int, int]]:
    """(size, stride in the tensor, stride in the file) with neighbouring axes joined."""
    axes: list[tuple[int, int, int]] = []
    for size, flat, stored in zip(sizes, outer, inner, strict=True):
        if size == 1:
            continue
        if axes and axes[-1][1:] == (size * flat, size * stored):
            axes[-1] = (axes[-1][0] * size, flat, stored)
        else:
            axes.append((size, flat, stored))
    return axes
