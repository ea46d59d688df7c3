from __future__ import annotations

import itertools
import math

import pytest
import torch

from bigtrain.checkpoint.boxes import Box, box_extents, cut_range
from bigtrain.checkpoint.dtypes import DTYPES
from bigtrain.checkpoint.index import Extents, TensorEntry, tiling_fault

SHAPES = [(), (1,), (6,), (3, 5), (2, 3, 4), (2, 1, 3, 2), (5, 1), (1, 1, 4)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_flat_range_is_cut_into_few_boxes_in_its_order(shape: tuple[int, ...]) -> None:
    numel = math.prod(shape)
    flat = torch.arange(numel)
    whole = flat.reshape(shape)
    for start, stop in itertools.combinations(range(numel + 1), 2):
        boxes = list(cut_range(shape, start, stop))
        pieces = [whole[_slices(box)].reshape(-1) for box in boxes]
        assert torch.equal(torch.cat(pieces), flat[start:stop])
        assert len(boxes) <= max(1, 2 * len(shape) - 1)


def test_an_empty_range_has_no_box() -> None:
    assert list(cut_range((3, 5), 4, 4)) == []


@pytest.mark.parametrize("shape", [(6,), (3, 5), (2, 3, 4), (2, 2, 3, 2)], ids=str)
def test_any_box_in_any_memory_order_lands_in_its_place(shape: tuple[int, ...]) -> None:
    whole = torch.arange(math.prod(shape)).reshape(shape)
    ranges = [[(a, b) for a in range(n) for b in range(a + 1, n + 1)] for n in shape]
    for bounds in itertools.islice(itertools.product(*ranges), 0, None, 7):
        box = Box(tuple(a for a, _ in bounds), tuple(b - a for a, b in bounds))
        for order in itertools.permutations(range(len(shape))):
            stored = whole[_slices(box)].permute(order).contiguous()
            inverse = sorted(range(len(order)), key=order.__getitem__)
            strides = stored.permute(inverse).stride()
            found = _scatter(shape, box, stored.reshape(-1), strides)
            expected = torch.full(shape, -1)
            expected[_slices(box)] = whole[_slices(box)]
            assert torch.equal(found.reshape(shape), expected)


def test_boxes_that_tile_a_tensor_are_found_to_do_so() -> None:
    def fault(*boxes: Box) -> str | None:
        extents = [
            extent
            for box in boxes
            for extent in box_extents((4, 6), box, file=0, offset=0, itemsize=4)
        ]
        entry = TensorEntry(
            name="w",
            kind="weight",
            shape=(4, 6),
            dtype=DTYPES["float32"],
            extents=Extents(extents),
        )
        return tiling_fault(entry)

    left, right = Box((0, 0), (4, 2)), Box((0, 2), (4, 4))
    assert fault(left, right) is None
    assert fault(left) == "weight of w: elements 2 to 6 are missing"
    assert (
        fault(left, right, Box((1, 1), (1, 1))) == "weight of w: elements 7 to 8 are stored twice"
    )


def _slices(box: Box) -> tuple[slice, ...]:
    return tuple(slice(a, a + n) for a, n in zip(box.offsets, box.sizes, strict=True))


def _scatter(
    shape: tuple[int, ...], box: Box, stored: torch.Tensor, strides: tuple[int, ...]
) -> torch.Tensor:
    found = torch.full((math.prod(shape),), -1)
    for extent in box_extents(shape, box, file=0, offset=0, itemsize=1, file_strides=strides):
        for k in range(extent.runs):
            at, source = extent.start + k * extent.stride, extent.skip + k * extent.file_stride
            found[at : at + extent.run] = stored[source : source + extent.run]
    return found
