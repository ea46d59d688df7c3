from __future__ import annotations

import itertools
import math

import pytest
import torch

from bigtrain.checkpoint import strided
from bigtrain.checkpoint.strided import read_strided

ARRAYS = {
    "transposed": ((4, 6), (1, 4)),
    "channels_last": ((2, 3, 2, 2), (12, 1, 6, 3)),
    "turned about": ((3, 2, 4), (1, 12, 3)),
    "every other of every third": ((3, 4), (2, 18)),
    "expanded by its columns": ((5, 3), (1, 0)),
    "expanded in the middle": ((2, 3, 4), (4, 0, 1)),
    "overlapping windows": ((4, 3), (2, 1)),
    "of one element": ((1, 1), (7, 7)),
    "of no dims": ((), ()),
}


@pytest.mark.parametrize("buffer_bytes", [4, 20, 64, 1 << 20])
@pytest.mark.parametrize("gap_bytes", [0, 8, 1 << 20])
@pytest.mark.parametrize("name", ARRAYS)
def test_any_range_of_any_array_is_read_in_its_order(
    name: str, gap_bytes: int, buffer_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(strided, "_BUFFER_BYTES", buffer_bytes)
    monkeypatch.setattr(strided, "_GAP_BYTES", gap_bytes)
    shape, strides = ARRAYS[name]
    stored = torch.arange(100, dtype=torch.int32)
    expected = stored.as_strided(shape, strides, 5).reshape(-1)
    content = stored.numpy().tobytes()

    def read(offset: int, out: memoryview) -> None:
        assert out.nbytes <= max(4, buffer_bytes)
        out[:] = content[offset : offset + out.nbytes]

    axes = [(size, 4 * stride) for size, stride in zip(shape, strides, strict=True)]
    for start, stop in itertools.combinations(range(math.prod(shape) + 1), 2):
        found = torch.empty(stop - start, dtype=torch.int32)
        out = memoryview(found.numpy()).cast("B")
        read_strided(axes, offset=20, width=4, start=start, out=out, read=read)
        assert torch.equal(found, expected[start:stop])


def test_bytes_between_far_rows_are_not_read() -> None:
    asked = []

    def read(offset: int, out: memoryview) -> None:
        asked.append((offset, out.nbytes))

    out = memoryview(bytearray(2 * 3 * 4))
    read_strided([(9, 4), (3, 1 << 20)], offset=0, width=4, start=3, out=out, read=read)

    assert asked == [(4, 8), (4 + (1 << 20), 8), (4 + (2 << 20), 8)]
