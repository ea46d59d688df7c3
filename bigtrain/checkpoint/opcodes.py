"""Checks a pickle's opcodes before it is read: none asks for more memory than the pickle's size.

C's unpickler makes its memo as long as the highest index that is named, and a string before it has
read one: a few bytes can name any number. Neither is the case in what a pickler writes.
https://github.com/python/cpython/blob/main/Lib/pickletools.py
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable

_LENGTHS: dict[int, tuple[int, Callable[[bytes], tuple[int]]]] = {
    opcode: (size, struct.Struct(form).unpack)
    for opcodes, size, form in (
        (b"U\x8cC\x8a", 1, "<B"),
        (b"XBT\x8b", 4, "<I"),
        (b"\x8d\x8e\x96", 8, "<Q"),
    )
    for opcode in opcodes
}
"""Opcodes that are followed by a length and so many bytes."""
_STOP = ord(".")


def fault_of(content: bytes) -> str | None:
    """What is wrong with the opcodes of the pickle; None when it can be read."""
    match_fixed = _fixed(len(content)).match
    position = 0
    while True:
        match = match_fixed(content, position)
        position = match.end() if match else position
        opcode = content[position] if position < len(content) else None
        if opcode == _STOP:
            return None
        if opcode is None or opcode not in _LENGTHS:
            return f"no opcode that a pickler writes is at byte {position}"
        size, unpack = _LENGTHS[opcode]
        start = position + 1 + size
        if start > len(content):
            return f"it ends at byte {len(content)}, within an opcode"
        position = start + unpack(content[position + 1 : start])[0]
        if position > len(content):
            return f"the opcode at byte {start - 1 - size} takes more bytes than there are"


def _fixed(size: int) -> re.Pattern[bytes]:
    """As many opcodes as there are that no length follows. An index of the memo is below the next
    power of two of the pickle's `size`."""
    whole, rest = divmod(max(8, min(32, size.bit_length())) - 1, 8)
    index = rb"." * whole + b"[\\x00-\\x%02x]" % ((2 << rest) - 1) + rb"\x00" * (3 - whole)
    alternatives = (
        rb"[]()0-2NQRabd}elostu\x81\x85-\x89\x8f-\x94\x97\x98]",
        rb"[Khq\x80\x82].",
        rb"[M\x83]..",
        rb"[Jj\x84]....",
        rb"[G\x95].{8}",
        rb"r" + index,
        rb"p[0-9]{1,%d}\n" % len(str(size)),
        rb"[gIFLSVP][^\n]*\n",
        rb"[ci][^\n]*\n[^\n]*\n",
    )
    return re.compile(b"(?:" + b"|".join(alternatives) + b")*+", re.DOTALL)
