"""CRC-32: fast, and of pieces put together, so that several workers may read a record in any order.

ISA-L's is several times as fast as zlib's, which is taken where there is none (it has wheels for
x86-64 and arm64).

A CRC is linear over GF(2): that of two pieces in a row follows from both, and the second's
length. As zlib's `crc32_combine`, which Python doesn't offer.
https://github.com/madler/zlib/blob/develop/crc32.c
"""

from __future__ import annotations

from functools import lru_cache

try:
    from isal.isal_zlib import crc32
except ImportError:
    from zlib import crc32

__all__ = ["combine_crc32", "crc32"]

_POLYNOMIAL = 0xEDB88320
_ONE = 1 << 31
"""x to the power 0: bits are reversed."""


def combine_crc32(first: int, second: int, second_length: int) -> int:
    """The CRC-32 of two pieces in a row, from that of each."""
    return _multiply(_shift(second_length), first) ^ second


def _multiply(a: int, b: int) -> int:
    """The product of two polynomials modulo CRC-32's."""
    product, bit = 0, _ONE
    while a:
        if a & bit:
            product ^= b
            a ^= bit
        bit >>= 1
        b = (b >> 1) ^ _POLYNOMIAL if b & 1 else b >> 1
    return product


@lru_cache(maxsize=4096)
def _shift(length: int) -> int:
    """x to the power of 8 · length: what so many bytes behind do to a CRC."""
    result, square = _ONE, 1 << 23
    while length:
        if length & 1:
            result = _multiply(square, result)
        square = _multiply(square, square)
        length >>= 1
    return result
