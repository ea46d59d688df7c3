"""What a committed checkpoint says of itself.

    manifest.json                 small; written last; sealed by a checksum; names the parts
    manifest/rank-00000.json      what one rank wrote: files with the hashes of their blocks, and
                                  where in them the elements of which tensors lie

A directory without `manifest.json` is no checkpoint. The parts hold whole columns of numbers as
base64, little-endian, because a large run writes millions of items.
"""

from __future__ import annotations

import base64
import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, TypeAlias

from bigtrain.checkpoint.blocks import FileDigest, hash_bytes
from bigtrain.checkpoint.items import StoredItem, StoredItems
from bigtrain.checkpoint.json_object import counts, json_object
from bigtrain.errors import CheckpointError

MANIFEST = "manifest.json"
PARTS = "manifest"
FORMAT = "bigtrain-checkpoint"
VERSION = 1

Layout: TypeAlias = Literal["transformers", "sharded"]


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far the training has come, counted so that another world size can go on from it."""

    step: int
    """Optimizer steps done, skipped ones included."""
    epoch: float = 0.0
    samples_seen: int = 0
    """Samples of the global order consumed since training began, over all epochs."""
    samples_in_epoch: int = 0
    """Of these, in the running epoch."""
    tokens_seen: int = 0
    global_batch_size: int | None = None
    seed: int | None = None


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """One tensor of which a rank wrote some elements."""

    name: str
    kind: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class StoredObject:
    """An item of a `.distcp` file that is no tensor: a hyperparameter of the optimizer's."""

    group: int
    name: str
    file: str
    begin: int
    length: int


@dataclass(frozen=True, kw_only=True)
class Part:
    """What one rank wrote."""

    rank: int
    files: Mapping[str, FileDigest] = field(default_factory=dict)
    """By path relative to the checkpoint."""
    tensors: tuple[StoredTensor, ...] = ()
    items: Sequence[StoredItem] = ()
    objects: tuple[StoredObject, ...] = ()

    def to_bytes(self) -> bytes:
        """As it stands in `manifest/rank-NNNNN.json`."""
        items = self.items if isinstance(self.items, StoredItems) else StoredItems.of(self.items)
        files, columns = items.to_json()
        document = {
            "rank": self.rank,
            "files": {name: _digest_to_json(digest) for name, digest in self.files.items()},
            "tensors": [[t.name, t.kind, t.dtype, t.shape] for t in self.tensors],
            "item_files": files,
            "items": columns,
            "objects": [[o.group, o.name, o.file, o.begin, o.length] for o in self.objects],
        }
        return json.dumps(document, separators=(",", ":")).encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> Part:
        """The part that `to_bytes` wrote."""
        # The table of tensors is the same in thousands of parts, and most of a part's text.
        begin, end = data.find(_TENSORS), data.find(_AFTER_TENSORS)
        if 0 <= begin < end:
            tensors = _tensor_table(data[begin + len(_TENSORS) : end])
            document = json.loads(data[:begin] + data[end:])
        else:
            document = json.loads(data)
            tensors = _tensor_table(json.dumps(document["tensors"]).encode())
        for name in (*document["files"], *document["item_files"]):
            _require_inside(name)
        return cls(
            rank=document["rank"],
            files={name: _digest_from_json(entry) for name, entry in document["files"].items()},
            tensors=tensors,
            items=StoredItems.from_json(document["item_files"], document["items"]),
            objects=tuple(
                StoredObject(group=group, name=name, file=file, begin=begin, length=length)
                for group, name, file, begin, length in document["objects"]
            ),
        )


@dataclass(frozen=True, kw_only=True)
class NodeOfCheckpoint:
    """One of the nodes that keep a checkpoint on disks of their own."""

    host: str
    ranks: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The root: what the checkpoint is, and the parts that make it up."""

    uuid: str
    layout: Layout
    run_id: str
    engine: str
    world_size: int
    progress: Progress
    created: str
    """UTC, ISO 8601."""
    versions: Mapping[str, str]
    parts: Mapping[str, tuple[int, str]]
    """Path of each part → its size and the xxh3-128 of its bytes."""
    param_groups: tuple[Mapping[str, Any], ...] | None = None
    """The optimizer's groups: hyperparameters, and `params` as names; None: weights only."""
    nodes: tuple[NodeOfCheckpoint, ...] = ()
    """All that wrote it, each to its own disk; none where they share the storage."""
    node: int | None = None
    """Which of these has this directory."""

    def to_bytes(self) -> bytes:
        """As it stands in `manifest.json`, with its seal."""
        document = {"format": FORMAT, "version": VERSION, **asdict(self)}
        document["param_groups"] = _plain(self.param_groups, where="param_groups")
        return _seal(document)

    @classmethod
    def from_bytes(cls, data: bytes, *, path: Path) -> Manifest:
        """The manifest that `to_bytes` wrote; `path` is for the error's text."""
        document = _unseal(data, path=path)
        if document.pop("format", None) != FORMAT or document.pop("version", None) != VERSION:
            raise CheckpointError(
                f"{path}: not a manifest of version {VERSION}; a newer bigtrain wrote it"
            )
        try:
            return cls._from_document(document)
        except MALFORMED as fault:
            raise CheckpointError(f"{path}: not a manifest: {_gist(fault)}") from None

    @classmethod
    def _from_document(cls, document: dict[str, Any]) -> Manifest:
        for name in ("uuid", "layout", "run_id", "engine", "created"):
            _require(document[name], str, name)
        document["progress"] = progress = _known(Progress, document["progress"])
        _require(progress.step, int, "progress.step")
        for name in document["parts"]:
            _require_inside(name)
        document["parts"] = {
            name: (size, digest) for name, (size, digest) in document["parts"].items()
        }
        _require(document["world_size"], int, "world_size")
        document["param_groups"] = _unplain(document["param_groups"])
        document["nodes"] = tuple(
            NodeOfCheckpoint(host=node["host"], ranks=counts(node["ranks"]))
            for node in document.get("nodes", ())
        )
        manifest: Manifest = _known(cls, document)
        return manifest


MALFORMED = (
    ArithmeticError,
    AttributeError,
    LookupError,
    RecursionError,
    TypeError,
    ValueError,
)
"""What a document of another shape than ours ends in: a seal says that nothing has changed, and not
who has made it."""


# A quote inside a JSON string is escaped, so these stand nowhere else.
_TENSORS = b',"tensors":'
_AFTER_TENSORS = b',"item_files":'


@functools.lru_cache(maxsize=16)
def _tensor_table(text: bytes) -> tuple[StoredTensor, ...]:
    return tuple(
        StoredTensor(name=name, kind=kind, dtype=dtype, shape=counts(shape))
        for name, kind, dtype, shape in json.loads(text)
    )


def _require_inside(name: str) -> None:
    """A manifest names no file outside of its checkpoint: its seal is no signature."""
    if name.startswith("/") or ".." in name.split("/"):
        raise CheckpointError(f"the manifest names the file {name}, outside of the checkpoint")


def part_name(rank: int) -> str:
    """Path of a rank's part, relative to the checkpoint."""
    return f"{PARTS}/rank-{rank:05d}.json"


def read_manifest(checkpoint: Path) -> Manifest:
    """The root of a committed checkpoint; CheckpointError when there is none or it is damaged."""
    path = checkpoint / MANIFEST
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise CheckpointError(
            f"{checkpoint} has no {MANIFEST}: it was never committed, or bigtrain did not write it"
        ) from None
    except OSError as fault:
        raise CheckpointError(f"{path}: can't be read: {fault.strerror}") from fault
    return Manifest.from_bytes(data, path=path)


def read_part(checkpoint: Path, name: str, *, manifest: Manifest) -> Part:
    """One of the manifest's parts, checked against the hash that the root has of it."""
    size, expected = manifest.parts[name]
    path = checkpoint / name
    try:
        data = path.read_bytes()
    except OSError as fault:
        raise CheckpointError(f"{path}: can't be read: {fault.strerror}") from fault
    if len(data) != size or hash_bytes(data).hex() != expected:
        raise CheckpointError(f"{path}: is not as it was written; the checkpoint is damaged")
    try:
        return Part.from_bytes(data)
    except MALFORMED as fault:
        raise CheckpointError(f"{path}: not a part of a manifest: {_gist(fault)}") from None


def read_parts(checkpoint: Path, *, manifest: Manifest) -> list[Part]:
    """All parts, by rank."""
    return [read_part(checkpoint, name, manifest=manifest) for name in sorted(manifest.parts)]


def _require(value: Any, kind: type, name: str) -> Any:
    """`value`, where it is of this kind."""
    if type(value) is not kind:
        raise TypeError(f"{name} is {value!r:.40}")
    return value


def _gist(fault: Exception) -> str:
    return f"no {fault}" if isinstance(fault, KeyError) else f"{fault}"[:200]


def _known(cls: Any, values: Mapping[str, Any]) -> Any:
    """A dataclass from the values it knows: later versions may have written more."""
    names = {declared.name for declared in fields(cls)}
    return cls(**{name: value for name, value in values.items() if name in names})


def _seal(document: Mapping[str, Any]) -> bytes:
    checksum = hash_bytes(_canonical(document)).hex()
    return json.dumps({"checksum": checksum, **document}, indent=1).encode()


def _unseal(data: bytes, *, path: Path) -> dict[str, Any]:
    try:
        document = json_object(data)
        checksum = document.pop("checksum")
        expected = hash_bytes(_canonical(document)).hex()
    except (ValueError, KeyError, RecursionError):
        raise CheckpointError(f"{path}: not a whole manifest; the file is damaged") from None
    if expected != checksum:
        raise CheckpointError(f"{path}: its checksum is wrong; the file was edited or is damaged")
    return document


def _canonical(document: Any) -> bytes:
    return json.dumps(document, sort_keys=True, separators=(",", ":")).encode()


def _digest_to_json(digest: FileDigest) -> list[Any]:
    return [digest.size, _text(digest.blocks)]


def _digest_from_json(entry: Sequence[Any]) -> FileDigest:
    size, blocks = entry
    return FileDigest(size=size, blocks=base64.b64decode(blocks))


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _plain(value: Any, *, where: str) -> Any:
    """`value` for JSON, with tuples kept apart from lists: `betas` is one."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, tuple):
        return {"tuple": [_plain(each, where=where) for each in value]}
    if isinstance(value, list):
        return [_plain(each, where=where) for each in value]
    if isinstance(value, Mapping):
        return {"dict": {str(k): _plain(v, where=f"{where}.{k}") for k, v in value.items()}}
    raise CheckpointError(
        f"the optimizer's {where} is a {type(value).__name__}; a checkpoint holds plain values"
    )


def _unplain(value: Any) -> Any:
    if isinstance(value, list):
        return [_unplain(each) for each in value]
    if isinstance(value, dict) and "tuple" in value:
        return tuple(_unplain(each) for each in value["tuple"])
    if isinstance(value, dict):
        return {key: _unplain(each) for key, each in value["dict"].items()}
    return value
