"""Where each kind of source keeps the checksums of what it stored."""

from __future__ import annotations

from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bigtrain.checkpoint.dtypes import dtype_named
from bigtrain.checkpoint.formats.dcp import METADATA, counted, inside
from bigtrain.checkpoint.inert import brief, read_pickle
from bigtrain.checkpoint.manifest import Part
from bigtrain.checkpoint.torch_file import Archive
from bigtrain.checkpoint.witness import Record, Records, RecordSource
from bigtrain.errors import CheckpointError

_KEPT_ITEMS = 1024


def torch_file_records() -> RecordSource:
    """Of files that are one `torch.save` zip each: the CRC-32 of every storage."""
    tables: dict[Path, Records] = {}

    def find(path: Path, offset: int) -> Record | None:
        if path not in tables:
            tables[path] = _zip_records(Archive(path))
        return tables[path].at(offset)

    return find


def check_torch_files(paths: Sequence[Path]) -> int:
    """Check the CRC-32 of every record in these files; of how many storages."""
    return sum(_check_zip(Archive(path), 0) for path in paths)


def item_records(checkpoint: Path, parts: Sequence[Part]) -> RecordSource:
    """Of bigtrain's own: the xxh3 of every item, as the manifest has it."""
    by_file: dict[Path, list[Record]] = {}
    itemsizes = {part.rank: [dtype_named(t.dtype).itemsize for t in part.tensors] for part in parts}
    for part in parts:
        for item in part.items:
            nbytes = item.numel * itemsizes[part.rank][item.tensor]
            record = Record(item.payload, item.payload + nbytes, xxh3=item.hash)
            by_file.setdefault(checkpoint / item.file, []).append(record)
    tables = {path: Records(records) for path, records in by_file.items()}

    def find(path: Path, offset: int) -> Record | None:
        table = tables.get(path)
        return table.at(offset) if table else None

    return find


@dataclass(frozen=True, kw_only=True)
class DcpItems:
    """What a DCP directory's `.metadata` says of its items, beside what they are."""

    directory: Path
    items: Mapping[Path, Sequence[tuple[int, int]]]
    """(offset, length) of the items in each file, sorted."""

    def records(self) -> RecordSource:
        """The CRC-32 of every item's storage; an item is a whole zip."""
        starts = {path: [offset for offset, _ in items] for path, items in self.items.items()}
        opened: OrderedDict[tuple[Path, int], Records] = OrderedDict()

        def find(path: Path, offset: int) -> Record | None:
            position = bisect_right(starts[path], offset) - 1
            if (path, position) not in opened:
                begin, length = self.items[path][position]
                opened[path, position] = _zip_records(Archive(path, offset=begin, length=length))
                if len(opened) > _KEPT_ITEMS:
                    opened.popitem(last=False)
            return opened[path, position].at(offset)

        return find

    def check_all(self) -> int:
        """Check the CRC-32 of every record of every item; of how many storages."""
        return sum(
            _check_zip(Archive(path, offset=offset, length=length), offset)
            for path, items in self.items.items()
            for offset, length in items
        )

    def check_files(self) -> None:
        """Raise unless every file is there, and as long as its items need."""
        for path, items in self.items.items():
            needed = max(offset + length for offset, length in items)
            if not path.is_file():
                raise CheckpointError(f"{path}: is missing; {METADATA} names it")
            if path.stat().st_size < needed:
                raise CheckpointError(
                    f"{path}: has {path.stat().st_size} bytes, and its items reach to {needed}; "
                    "the file is cut off"
                )

    def check_times(self, *, tolerance_s: float) -> None:
        """Raise where a file was written after `.metadata`, which a save writes last."""
        written = (self.directory / METADATA).stat().st_mtime
        newer = [p for p in self.items if p.stat().st_mtime > written + tolerance_s]
        if newer:
            raise CheckpointError(
                f"{newer[0]}: is newer than {METADATA}, which a save writes last: a save over this "
                "directory was cut short, and it mixes two steps; or the files were copied without "
                "their times: then copy with them (cp -a, rsync -t), or trust the files as they "
                "are (--trust-times)"
            )


def read_dcp_items(directory: Path) -> DcpItems:
    """Where the items of a DCP directory lie."""
    path = directory / METADATA
    metadata = read_pickle(path.read_bytes(), path=path)
    try:
        items: dict[str, list[tuple[int, int]]] = {}
        for info in metadata.fields["storage_data"].values():
            place = (counted(info.fields["offset"]), counted(info.fields["length"]))
            items.setdefault(info.fields["relative_path"], []).append(place)
        files = {name: directory / inside(directory, name) for name in items}
    except (AttributeError, KeyError, TypeError, ValueError) as fault:
        raise CheckpointError(
            f"{path}: not the metadata of a DCP checkpoint ({brief(fault)})"
        ) from fault
    return DcpItems(
        directory=directory,
        items={files[name]: sorted(places) for name, places in items.items()},
    )


def _check_zip(archive: Archive, offset: int) -> int:
    checksums = [crc for _, _, crc in archive.checksums()]
    if checksums and checksums[0] is None:
        return 0
    if damaged := archive.first_damaged():
        raise CheckpointError(
            f"{archive.path}: its record {damaged} (of the zip at byte {offset}) is not as it was "
            "written; the checkpoint is damaged, use another one"
        )
    return len(checksums)


def _zip_records(archive: Archive) -> Records:
    return Records(Record(start, stop, crc32=crc) for start, stop, crc in archive.checksums())
