"""torch.distributed.checkpoint directories.

`.metadata` (a pickle, read without running it) lists every tensor's chunks, and for each the item
of a `.distcp` file that holds it: a whole `torch.save` zip. Keys as torch's `get_state_dict`
writes them: `model.<name>`, `optim.state.<name>.<kind>`, `optim.param_groups.<i>.<field>`. Others
say `optimizer` for `optim` (accelerate), and torchtitan, which flattens the optimizer's state,
`optimizer.param_groups.<name>.<field>`; what each stands for, `dcp_keys` tells.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from bigtrain.checkpoint.boxes import Box, box_extents, contiguous_strides
from bigtrain.checkpoint.dtypes import DType, dtype_named
from bigtrain.checkpoint.formats.dcp_keys import MODEL, Keys, Sets, read_keys
from bigtrain.checkpoint.index import WEIGHT, Extent, Extents, TensorEntry, TensorIndex
from bigtrain.checkpoint.inert import (
    Inert,
    brief,
    class_name,
    plain_record,
    read_name,
    read_pickle,
    unfolds,
    without_collecting,
)
from bigtrain.checkpoint.json_object import counts
from bigtrain.checkpoint.torch_file import Archive, TensorRef
from bigtrain.errors import CheckpointError

METADATA = ".metadata"
STATE = "optim.state"
GROUPS = "optim.param_groups"
_LONGEST_NAME = 255
"""Of a file, on nearly all file systems."""


class _Item(NamedTuple):
    """One stored item, as `_StorageInfo` has it."""

    file: int
    offset: int
    length: int


class _Chunk(NamedTuple):
    key: str
    box: Box


@dataclass(frozen=True, kw_only=True)
class _Directory:
    """What `.metadata` says."""

    path: Path
    files: tuple[Path, ...]
    tensors: Mapping[str, tuple[DType, tuple[int, ...], tuple[Box, ...]]]
    keys: Keys
    items: Mapping[tuple[str, tuple[int, ...] | None], _Item]
    """By key and, for a tensor, the chunk's offsets."""


def is_dcp(directory: Path) -> bool:
    """Whether `directory` was written by torch.distributed.checkpoint."""
    return (directory / METADATA).is_file()


def read_dcp(directory: Path) -> TensorIndex:
    """The index of one DCP directory. A stored item is opened when its extents are asked for.

    The weights of the set `model` go by their names in it, those of others by their keys.
    """
    index, _ = read_dcp_sets(directory)
    return index


def read_dcp_sets(directory: Path) -> tuple[TensorIndex, Sets[Mapping[str, TensorEntry]]]:
    """The same, and the sets of weights in it."""
    with without_collecting():
        found = _read_metadata(directory)
        names = _names(found.keys)
        index = _index(found, names)
    sets = {
        set_name: {name: index.entries[names[key]] for name, key in weights.items()}
        for set_name, weights in found.keys.sets.items()
    }
    return index, Sets(sets)


def _names(keys: Keys) -> dict[str, tuple[str, str]]:
    """(name, kind) of the tensor that is stored under each key."""
    names = dict(keys.states)
    for weights in keys.sets.values():
        names |= {key: (key, WEIGHT) for key in weights.values()}
    return names | {key: (name, WEIGHT) for name, key in keys.sets.get(MODEL, {}).items()}


def _index(found: _Directory, names: Mapping[str, tuple[str, str]]) -> TensorIndex:
    chunks: dict[tuple[int, int], _Chunk] = {}
    entries: dict[tuple[str, str], TensorEntry] = {}

    def locate(file: int, offset: int) -> int:
        return _locate(found, chunks[file, offset])

    for key, (name, kind) in names.items():
        if (name, kind) in entries:
            raise CheckpointError(
                f"{found.path / METADATA}: {key} is the {kind} of {name}, and another key is it "
                "too; save it again with the model in a dict of its own"
            )
        dtype, shape, boxes = found.tensors[key]
        items = [_item_of(found, key, box) for box in boxes]
        for item, box in zip(items, boxes, strict=True):
            chunks[item.file, item.offset] = _Chunk(key, box)
        try:
            extents = _extents(shape, dtype, boxes, items, locate)
        except (ValueError, TypeError, IndexError, OverflowError) as fault:
            raise CheckpointError(
                f"{found.path / METADATA}: the pieces of {key} are none of a tensor of "
                f"{list(shape)} ({brief(fault)}); it is damaged"
            ) from fault
        entries[name, kind] = TensorEntry(
            name=name, kind=kind, shape=shape, dtype=dtype, extents=extents
        )
    return TensorIndex(files=found.files, entries=entries, param_groups=_read_groups(found))


def _extents(
    shape: tuple[int, ...],
    dtype: DType,
    boxes: Sequence[Box],
    items: Sequence[_Item],
    locate: Callable[[int, int], int],
) -> Extents:
    inner = shape[1:]
    if shape and all(sizes[1:] == inner and not any(at[1:]) for at, sizes in boxes):
        # Whole rows, as FSDP cuts them: of a large model there are hundreds of thousands.
        row = math.prod(inner)
        filled = [(b, i) for b, i in zip(boxes, items, strict=True) if b.sizes[0] and row]
        return Extents.of_single_runs(
            file=array("q", [item.file for _, item in filled]),
            offset=array("q", [item.offset for _, item in filled]),
            start=array("q", [box.offsets[0] * row for box, _ in filled]),
            run=array("q", [box.sizes[0] * row for box, _ in filled]),
            locate=locate,
        )
    extents: list[Extent] = []
    for box, item in zip(boxes, items, strict=True):
        extents += box_extents(
            shape, box, file=item.file, offset=item.offset, itemsize=dtype.itemsize
        )
    return Extents(extents, locate=locate)


def join_key(name: str, kind: str) -> str:
    """The key under which a tensor is stored; weights and buffers are the model's."""
    return f"{MODEL}.{name}" if kind in ("weight", "buffer") else f"{STATE}.{name}.{kind}"


def _read_metadata(directory: Path) -> _Directory:
    path = directory / METADATA
    try:
        data = path.read_bytes()
    except OSError as fault:
        raise CheckpointError(f"{path}: can't be read: {fault.strerror}") from fault
    many = {
        ("torch.distributed.checkpoint.metadata", "ChunkStorageMetadata"): plain_record(),
        ("torch.distributed.checkpoint.metadata", "MetadataIndex"): plain_record(),
        ("torch.distributed.checkpoint.filesystem", "_StorageInfo"): plain_record(),
    }
    metadata = read_pickle(data, path=path, names=many)
    try:
        return _parse(directory, metadata.fields)
    except (AttributeError, KeyError, TypeError, ValueError, IndexError) as fault:
        raise CheckpointError(
            f"{path}: not the metadata of a DCP checkpoint ({brief(fault)})"
        ) from fault


def _parse(directory: Path, metadata: Mapping[str, Any]) -> _Directory:
    files: dict[str, int] = {}
    items: dict[tuple[str, tuple[int, ...] | None], _Item] = {}
    for index, info in metadata["storage_data"].items():
        where = vars(info)
        if where.get("transform_descriptors"):
            transforms = brief(where["transform_descriptors"])
            raise CheckpointError(
                f"{directory}: stored through the transforms {transforms}, which are not known here"
            )
        name = where["relative_path"]
        if name not in files:
            files[inside(directory, name)] = len(files)
        place = vars(index)
        items[place["fqn"], place.get("offset")] = _Item(
            files[name], counted(where["offset"]), counted(where["length"])
        )
    tensors = {}
    objects = []
    for key, stored in metadata["state_dict_metadata"].items():
        if class_name(stored) == "TensorStorageMetadata":
            tensors[key] = _parse_tensor(stored)
        else:
            objects.append(key)
    return _Directory(
        path=directory,
        files=tuple(directory / name for name in files),
        tensors=tensors,
        keys=read_keys(tensors, objects, metadata.get("planner_data")),
        items=items,
    )


def _parse_tensor(stored: Inert) -> tuple[DType, tuple[int, ...], tuple[Box, ...]]:
    dtype_name = read_name(stored.fields["properties"].state[0]) or ""
    boxes = tuple(
        Box(tuple(chunk.offsets), tuple(chunk.sizes)) for chunk in stored.fields["chunks"]
    )
    shape = counts(list(stored.fields["size"]))
    return dtype_named(dtype_name.removeprefix("torch.")), shape, boxes


def counted(value: Any) -> int:
    """A number of bytes; ValueError for anything else."""
    if type(value) is not int or not 0 <= value < 1 << 63:
        raise ValueError(f"{brief(value)} where a number of bytes belongs")
    return value


def inside(directory: Path, relative: str) -> str:
    """The file's name, if it lies in the directory; CheckpointError else."""
    parts = Path(relative).parts
    if Path(relative).is_absolute() or ".." in parts or "\0" in relative or not parts:
        raise CheckpointError(f"{directory}: names the file {brief(relative)}, outside of itself")
    if max(map(len, parts)) > _LONGEST_NAME:
        raise CheckpointError(f"{directory}: names the file {brief(relative)}, which is too long")
    return relative


def _item_of(found: _Directory, key: str, box: Box) -> _Item:
    try:
        return found.items[key, box.offsets]
    except KeyError:
        raise CheckpointError(
            f"{found.path}: the piece of {key} at {box.offsets} is listed but not stored"
        ) from None


def _locate(found: _Directory, chunk: _Chunk) -> int:
    """Where the elements of a chunk begin in its file."""
    item = found.items[chunk.key, chunk.box.offsets]
    dtype, _, _ = found.tensors[chunk.key]
    path = found.files[item.file]
    stored = Archive(path, offset=item.offset, length=item.length).read()
    if (
        not isinstance(stored, TensorRef)
        or (stored.dtype, stored.shape) != (dtype, chunk.box.sizes)
        or not _is_row_major(stored)
    ):
        raise CheckpointError(
            f"{path}: the piece of {chunk.key} at {chunk.box.offsets} is not the {dtype.name} "
            f"{chunk.box.sizes} that {METADATA} says, in row-major order"
        )
    return stored.offset


def _is_row_major(stored: TensorRef) -> bool:
    expected = contiguous_strides(stored.shape)
    return all(
        size == 1 or stride == wanted
        for size, stride, wanted in zip(stored.shape, stored.strides, expected, strict=True)
    )


def _read_groups(found: _Directory) -> tuple[Mapping[str, Any], ...] | None:
    groups: dict[str, dict[str, Any]] = {}
    for key, (owner, field) in sorted(found.keys.groups.items()):
        item = found.items.get((key, None))
        if item is None:
            raise CheckpointError(f"{found.path}: {key} is listed but not stored")
        archive = Archive(found.files[item.file], offset=item.offset, length=item.length)
        groups.setdefault(owner, {})[field] = archive.read()
    if not groups:
        return None
    if all(owner.isdigit() for owner in groups):
        return tuple(groups[owner] for owner in sorted(groups, key=int))
    return _joined_groups(groups)


def _joined_groups(by_name: Mapping[str, Mapping[str, Any]]) -> tuple[Mapping[str, Any], ...]:
    """Groups of the parameters whose hyperparameters are all the same."""
    joined: dict[str, dict[str, Any]] = {}
    for name, fields in by_name.items():
        if unfolds(fields):
            raise CheckpointError(f"the optimizer's options of {name} are no plain values")
        group = joined.setdefault(repr(sorted(fields.items())), {**fields, "params": []})
        group["params"].append(name)
    return tuple(joined.values())
