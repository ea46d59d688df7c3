from __future__ import annotations

import os
import zlib

import pytest

from bigtrain.checkpoint.crc32 import combine_crc32, crc32


@pytest.mark.parametrize("lengths", [(0, 0), (5, 0), (0, 5), (1, 1), (1000, 70_001)])
def test_the_crc_of_two_pieces_follows_from_theirs(lengths: tuple[int, int]) -> None:
    first, second = (os.urandom(length) for length in lengths)
    combined = combine_crc32(zlib.crc32(first), zlib.crc32(second), len(second))
    assert combined == zlib.crc32(first + second)


@pytest.mark.parametrize("length", [0, 1, 15, 70_001])
def test_the_fast_crc_is_that_of_zlib_and_goes_on_from_another(length: int) -> None:
    first, second = os.urandom(length), os.urandom(33)
    assert crc32(first) == zlib.crc32(first)
    assert crc32(memoryview(second), crc32(first)) == zlib.crc32(first + second)
