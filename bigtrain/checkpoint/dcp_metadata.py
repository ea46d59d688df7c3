"""torch's own `.metadata`, written without torch.

The pickle of a `torch.distributed.checkpoint.metadata.Metadata`, put together from its opcodes:
what torch would pickle, at a fraction of the memory, and in a process that has no torch.
https://github.com/pytorch/pytorch/blob/main/torch/distributed/checkpoint/metadata.py
"""

from __future__ import annotations

import pickle
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from bigtrain.checkpoint.boxes import Box, cut_range
from bigtrain.checkpoint.formats.dcp import GROUPS, STATE, join_key
from bigtrain.checkpoint.items import StoredItem
from bigtrain.checkpoint.manifest import Part, StoredTensor
from bigtrain.checkpoint.pieces import MODEL_KINDS

_METADATA = "torch.distributed.checkpoint.metadata"
_FILE_SYSTEM = "torch.distributed.checkpoint.filesystem"
_GLOBALS = {
    name: number
    for number, name in enumerate(
        (
            (_METADATA, "ChunkStorageMetadata"),
            (_METADATA, "MetadataIndex"),
            (_FILE_SYSTEM, "_StorageInfo"),
            ("torch", "Size"),
        )
    )
}
_WORDS = {
    word: number
    for number, word in enumerate(
        ("offsets", "sizes", "fqn", "index", "offset", "relative_path", "length"), len(_GLOBALS)
    )
}
"""What each of hundreds of thousands of pieces names; by place in the pickle's memo."""


@dataclass(frozen=True, kw_only=True)
class _Chunk:
    box: Box
    file: str
    begin: int
    length: int


@dataclass(kw_only=True)
class _Tensor:
    dtype: str
    shape: tuple[int, ...]
    path: tuple[str, ...]
    chunks: dict[tuple[int, ...], _Chunk] = field(default_factory=dict)
    """By offsets: of an empty tensor, several ranks may hold the only, empty piece."""


def metadata_bytes(directory: str, parts: Iterable[Part]) -> bytes | None:
    """`.metadata` of one of a checkpoint's directories; None when nothing was stored in it."""
    tensors: dict[str, _Tensor] = {}
    objects: dict[str, tuple[tuple[str | int, ...], str, int, int]] = {}
    for part in parts:
        for item in part.items:
            folder, _, name = item.file.rpartition("/")
            if folder == directory and item.length:
                _add_chunk(tensors, part.tensors[item.tensor], item, name)
        for stored in part.objects:
            folder, _, name = stored.file.rpartition("/")
            if folder == directory:
                path: tuple[str | int, ...] = (*GROUPS.split("."), stored.group, stored.name)
                key = f"{GROUPS}.{stored.group}.{stored.name}"
                objects[key] = (path, name, stored.begin, stored.length)
    if not tensors and not objects:
        return None
    paths = {key: tensor.path for key, tensor in tensors.items()}
    planner = {**paths, **{key: value[0] for key, value in objects.items()}}
    return b"".join(_metadata(tensors, {k: v[1:] for k, v in objects.items()}, planner))


def _add_chunk(
    tensors: dict[str, _Tensor], stored: StoredTensor, item: StoredItem, file: str
) -> None:
    key = join_key(stored.name, stored.kind)
    if key not in tensors:
        is_model = stored.kind in MODEL_KINDS
        path = ("model", stored.name) if is_model else (*STATE.split("."), stored.name, stored.kind)
        tensors[key] = _Tensor(dtype=stored.dtype, shape=stored.shape, path=path)
    box = box_of(stored.shape, item.start, item.numel)
    chunk = _Chunk(box=box, file=file, begin=item.begin, length=item.length)
    tensors[key].chunks.setdefault(box.offsets, chunk)


def box_of(shape: Sequence[int], start: int, numel: int) -> Box:
    """The one box that a stored item is."""
    if 0 in shape:
        return Box((0,) * len(shape), tuple(shape))
    (box,) = cut_range(shape, start, start + numel)
    return box


def _metadata(
    tensors: Mapping[str, _Tensor],
    objects: Mapping[str, tuple[str, int, int]],
    planner: Mapping[str, tuple[str | int, ...]],
) -> Iterable[bytes]:
    yield b"\x80\x04"
    yield b"".join(_known(_spelled(*each)) for each in _GLOBALS)
    yield b"".join(_known(_text(each)) for each in _WORDS)
    yield _new(_METADATA, "Metadata") + b"}("
    yield _text("state_dict_metadata") + b"}("
    for key, tensor in tensors.items():
        yield _text(key)
        yield from _tensor(tensor)
    for key in objects:
        yield _text(key) + _new(_METADATA, "BytesStorageMetadata")
    yield b"u" + _text("storage_data") + b"}("
    for key, tensor in tensors.items():
        for number, chunk in enumerate(tensor.chunks.values()):
            yield _index(key, _size(chunk.box.offsets), _integer(number))
            yield _storage(chunk.file, chunk.begin, chunk.length)
    for key, (file, begin, length) in objects.items():
        yield _index(key, b"N", b"N") + _storage(file, begin, length)
    yield b"u" + _text("storage_meta") + _new(_METADATA, "StorageMeta") + b"}("
    yield b"".join(_text(name) + b"N" for name in ("checkpoint_id", "save_id", "load_id"))
    yield _text("modules") + b"]ub" + _text("version") + b"N"
    # Last, because it fills the pickle's memo anew.
    yield _text("planner_data") + _plain(dict(planner)) + b"ub."


def _tensor(tensor: _Tensor) -> Iterable[bytes]:
    layout = _global("torch.serialization", "_get_layout") + _text("torch.strided") + b"\x85R"
    format_ = _global(_METADATA, "_MEM_FORMAT_ENCODING") + b"K\x00\x85R"
    state = b"(" + _global("torch", tensor.dtype) + layout + b"\x89" + format_ + b"\x89t"
    yield _new(_METADATA, "TensorStorageMetadata") + b"}("
    yield _text("properties") + _new(_METADATA, "TensorProperties") + state + b"b"
    yield _text("size") + _size(tensor.shape) + _text("chunks") + b"]("
    for chunk in tensor.chunks.values():
        yield (
            _new(_METADATA, "ChunkStorageMetadata")
            + b"}("
            + _word("offsets")
            + _size(chunk.box.offsets)
            + _word("sizes")
            + _size(chunk.box.sizes)
            + b"ub"
        )
    yield b"eub"


def _index(key: str, offset: bytes, number: bytes) -> bytes:
    fields = _word("fqn") + _text(key) + _word("index") + number + _word("offset") + offset
    return _new(_METADATA, "MetadataIndex") + b"}(" + fields + b"ub"


def _storage(file: str, begin: int, length: int) -> bytes:
    fields = (
        _word("relative_path")
        + _text(file)
        + _word("offset")
        + _integer(begin)
        + _word("length")
        + _integer(length)
    )
    return _new(_FILE_SYSTEM, "_StorageInfo") + b"}(" + fields + b"ub"


def _known(value: bytes) -> bytes:
    """`value`, which is on the stack, put where `BINGET` finds it and taken off again."""
    return value + b"\x940"


def _global(module: str, name: str) -> bytes:
    """A name of what is in the pickle often: said once, at its beginning."""
    number = _GLOBALS.get((module, name))
    if number is None:
        return _spelled(module, name)
    return b"h" + bytes([number])


def _spelled(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def _word(value: str) -> bytes:
    """The name of a field, said once as well."""
    return b"h" + bytes([_WORDS[value]])


def _new(module: str, name: str) -> bytes:
    return _global(module, name) + b")\x81"


def _size(numbers: Sequence[int]) -> bytes:
    return _global("torch", "Size") + b"(" + b"".join(map(_integer, numbers)) + b"t\x85R"


def _text(value: str) -> bytes:
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def _integer(value: int) -> bytes:
    if value < 1 << 31:
        return b"J" + struct.pack("<i", value)
    return b"\x8a\x08" + struct.pack("<q", value)


def _plain(value: object) -> bytes:
    """The opcodes of a plain value, without the marks around a pickle of its own."""
    return pickle.dumps(value, protocol=3)[2:-1]
