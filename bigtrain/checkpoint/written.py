"""Collects, while one rank writes, what its part of the manifest will say."""

from __future__ import annotations

from pathlib import Path

from bigtrain.checkpoint.blocks import FileDigest, HashingFile
from bigtrain.checkpoint.items import StoredItem, StoredItems
from bigtrain.checkpoint.manifest import Part, StoredObject, StoredTensor
from bigtrain.checkpoint.pieces import Piece


class Written:
    """Files, tensors and items that were written into a staging so far."""

    def __init__(self, staging: Path, *, rank: int) -> None:
        self.staging = staging
        self.rank = rank
        self.files: dict[str, FileDigest] = {}
        self._tensors: dict[StoredTensor, int] = {}
        self._items: list[StoredItem] = []
        self._objects: list[StoredObject] = []

    def add_file(self, name: str, digest: FileDigest) -> None:
        """A file is complete and on the disk."""
        self.files[name] = digest

    def write_file(self, name: str, content: bytes) -> FileDigest:
        """Write a small file."""
        with HashingFile(self.staging / name) as file:
            file.write(content)
        self.add_file(name, file.digest)
        return file.digest

    def add_item(
        self,
        piece: Piece,
        *,
        file: str,
        payload: int,
        start: int,
        numel: int,
        item_hash: bytes,
        begin: int = 0,
        length: int = 0,
    ) -> None:
        """Elements [start, start + numel) of the piece's tensor lie at `payload` of `file`."""
        item = StoredItem(
            tensor=self.add_tensor(piece),
            file=file,
            payload=payload,
            start=start,
            numel=numel,
            hash=item_hash,
            begin=begin,
            length=length,
        )
        self._items.append(item)

    def add_object(self, stored: StoredObject) -> None:
        """An item of a file that is no tensor."""
        self._objects.append(stored)

    def add_tensor(self, piece: Piece) -> int:
        """The tensor's number in this part."""
        tensor = StoredTensor(
            name=piece.name, kind=piece.kind, dtype=piece.dtype.name, shape=piece.shape
        )
        return self._tensors.setdefault(tensor, len(self._tensors))

    def part(self) -> Part:
        """The rank's part of the manifest."""
        return Part(
            rank=self.rank,
            files=self.files,
            tensors=tuple(self._tensors),
            items=StoredItems.of(self._items),
            objects=tuple(self._objects),
        )
