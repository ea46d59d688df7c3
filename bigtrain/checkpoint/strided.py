"""Reads tensors that lie in another order than their own: transposed, channels_last, expanded.

An output range is cut into boxes. Each is read in the order of the file, in few calls, and put
into the tensor's order by one strided copy. Needs numpy, but no torch.
"""

from __future__ import annotations

import itertools
import math
import mmap
from collections.abc import Callable, Sequence
from operator import mul
from typing import TYPE_CHECKING, Any, TypeAlias

from bigtrain.checkpoint.boxes import contiguous_strides, cut_range

if TYPE_CHECKING:
    import numpy as np

    Array: TypeAlias = np.ndarray[Any, Any]

Axes = Sequence[tuple[int, int]]
"""(size, step in bytes) along each dim of a stored array."""
ReadBytes = Callable[[int, memoryview], None]
"""(offset, out): fills `out` from there on."""

_BUFFER_BYTES = 4 << 20
_GAP_BYTES = 8 << 10
"""Reading so much in vain costs as much as another call."""


def read_strided(
    axes: Axes, *, offset: int, width: int, start: int, out: memoryview, read: ReadBytes
) -> None:
    """Fill `out` with the elements from `start` on, of `width` bytes each, in row-major order.

    The array's first element lies at `offset`.
    """
    import numpy  # not at module level: most tensors are row-major

    stop = start + out.nbytes // width
    elements = numpy.frombuffer(out, f"V{width}")
    # A map of its own, as the allocator would keep such a piece for each thread.
    buffer = memoryview(mmap.mmap(-1, max(width, _BUFFER_BYTES)))
    done = 0
    for box in cut_range([size for size, _ in axes], start, stop):
        target = elements[done : done + box.numel].reshape(box.sizes)
        steps = [step for _, step in axes]
        first = offset + sum(map(mul, box.offsets, steps))
        order = sorted(range(len(axes)), key=steps.__getitem__, reverse=True)
        box_axes = [(box.sizes[dim], steps[dim]) for dim in order]
        _read_box(box_axes, first, target.transpose(order), buffer, read)
        done += box.numel


def _read_box(axes: Axes, offset: int, target: Array, buffer: memoryview, read: ReadBytes) -> None:
    """Fill `target`, whose dims are `axes`, those of the largest steps first."""
    import numpy
    from numpy.lib.stride_tricks import as_strided

    together, span = _joined(axes, target.itemsize)
    outer = axes[: len(axes) - together]
    sizes = [size for size, _ in outer]
    nbytes = math.prod(sizes) * span
    if nbytes > buffer.nbytes:
        count = axes[0][0] * buffer.nbytes // nbytes
        _read_parts(axes, offset, target, buffer, read, count=count)
        return
    places = itertools.product(*(range(0, size * step, step) for size, step in outer))
    for number, place in enumerate(places):
        read(offset + sum(place), buffer[number * span : (number + 1) * span])
    steps = [stride * span for stride in contiguous_strides(sizes)]
    steps += [step for _, step in axes[len(outer) :]]
    target[...] = as_strided(numpy.frombuffer(buffer[:nbytes], target.dtype), target.shape, steps)


def _read_parts(
    axes: Axes, offset: int, target: Array, buffer: memoryview, read: ReadBytes, *, count: int
) -> None:
    """The same, `count` indices of the first axis at a time."""
    (size, step), rest = axes[0], axes[1:]
    for begin in range(0, size, max(1, count)):
        at = offset + begin * step
        if count <= 1:
            _read_box(rest, at, target[begin, ...], buffer, read)  # a view of one element too
        else:
            part = target[begin : begin + count]
            _read_box([(len(part), step), *rest], at, part, buffer, read)


def _joined(axes: Axes, width: int) -> tuple[int, int]:
    """How many of the last axes are read at once, as the gaps in them are small; their bytes."""
    span = width
    for number, (size, step) in enumerate(reversed(axes)):
        if size > 1 and step - span > _GAP_BYTES:
            return number, span
        span += (size - 1) * step
    return len(axes), span
