"""What a rank stored, item by item, kept as columns: a large run's checkpoint has millions."""

from __future__ import annotations

import base64
import functools
import sys
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_HASH_BYTES = 16
_NUMBERS = ("tensor", "file", "payload", "start", "numel", "begin", "length")


@dataclass(frozen=True, kw_only=True)
class StoredItem:
    """A contiguous piece of a flattened tensor, stored as it is."""

    tensor: int
    """Which of the part's tensors."""
    file: str
    """Relative to the checkpoint."""
    payload: int
    """Of the first element, in bytes from the file's beginning."""
    start: int
    numel: int
    hash: bytes
    """xxh3-128 of the piece's bytes."""
    begin: int = 0
    """Of the torch.save zip in a `.distcp` file that holds it; else 0."""
    length: int = 0
    """Of that zip, in bytes."""


class StoredItems(Sequence[StoredItem]):
    """Items in columns, which nobody changes; `files` are what the column `file` numbers."""

    def __init__(
        self, columns: Mapping[str, array[int]], files: tuple[str, ...], hashes: bytes
    ) -> None:
        self.columns = columns
        self.files = files
        self._hashes = hashes

    @classmethod
    def of(cls, items: Iterable[StoredItem]) -> StoredItems:
        """These."""
        rows = list(items)
        files = tuple(sorted({item.file for item in rows}))
        number = {name: position for position, name in enumerate(files)}
        columns = {
            name: array("q", [getattr(item, name) for item in rows])
            for name in _NUMBERS
            if name != "file"
        }
        columns["file"] = array("q", [number[item.file] for item in rows])
        return cls(columns, files, b"".join(item.hash for item in rows))

    def to_json(self) -> tuple[list[str], dict[str, str]]:
        """Files, and the columns as base64 of little-endian 64-bit numbers."""
        packed = {name: _pack(self.columns[name]) for name in _NUMBERS}
        return list(self.files), {**packed, "hash": base64.b64encode(self._hashes).decode()}

    @classmethod
    def from_json(cls, files: Sequence[str], packed: Mapping[str, str]) -> StoredItems:
        """What `to_json` gave."""
        columns = {name: _unpack(packed[name]) for name in _NUMBERS}
        if len({len(column) for column in columns.values()}) > 1:
            raise ValueError("columns of different lengths")
        return cls(columns, tuple(files), base64.b64decode(packed["hash"]))

    def __len__(self) -> int:
        return len(self.columns["tensor"])

    def __getitem__(self, position: Any) -> Any:
        if isinstance(position, slice):
            return [self[i] for i in range(*position.indices(len(self)))]
        if not -len(self) <= position < len(self):
            raise IndexError(position)
        position %= len(self)
        numbers = {name: self.columns[name][position] for name in _NUMBERS if name != "file"}
        place = position * _HASH_BYTES
        return StoredItem(
            file=self.files[self.columns["file"][position]],
            hash=self._hashes[place : place + _HASH_BYTES],
            **numbers,
        )

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]


def _pack(column: array[int]) -> str:
    if sys.byteorder == "big":
        column = column[:]
        column.byteswap()
    return base64.b64encode(column).decode()


@functools.lru_cache(maxsize=64)
def _unpack(text: str) -> array[int]:
    """Ranks with shards of one size have most columns in common, and share them here."""
    column = array("q")
    column.frombytes(base64.b64decode(text))
    if sys.byteorder == "big":
        column.byteswap()
    return column
