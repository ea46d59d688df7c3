from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest

from bigtrain.checkpoint.blocks import FileDigest, hash_bytes
from bigtrain.checkpoint.items import StoredItem
from bigtrain.checkpoint.manifest import (
    Manifest,
    Part,
    Progress,
    StoredTensor,
    read_manifest,
    read_part,
)
from bigtrain.checkpoint.node_view import own_ranks
from bigtrain.errors import CheckpointError

PART = Part(
    rank=3,
    files={"weights/__3_0.distcp": FileDigest(size=5 << 20, blocks=bytes(range(32)))},
    tensors=(StoredTensor(name="a.b", kind="weight", dtype="float32", shape=(2, 3)),),
    items=(
        StoredItem(
            tensor=0,
            file="weights/__3_0.distcp",
            payload=2**40,
            start=1,
            numel=5,
            hash=bytes(range(16)),
        ),
    ),
)
MANIFEST = Manifest(
    uuid="u",
    layout="sharded",
    run_id="run",
    engine="zero3",
    world_size=4,
    progress=Progress(step=7, epoch=0.1, samples_seen=84, seed=42),
    created="2026-01-01T00:00:00+00:00",
    versions={"torch": "2.13.0"},
    parts={"manifest/rank-00000.json": (10, "ab")},
    param_groups=({"params": ["a.b"], "lr": 0.1 + 0.2, "betas": (0.9, 0.95), "foreach": None},),
)


def test_a_part_and_a_root_survive_the_round_trip_exactly() -> None:
    assert Part.from_bytes(PART.to_bytes()) == PART
    assert Part.from_bytes(Part(rank=0).to_bytes()) == Part(rank=0)
    assert Manifest.from_bytes(MANIFEST.to_bytes(), path=Path("m")) == MANIFEST


def test_no_single_changed_byte_of_the_root_goes_unseen() -> None:
    data = MANIFEST.to_bytes()
    for position in range(len(data)):
        changed = bytearray(data)
        changed[position] ^= 1
        try:
            read = Manifest.from_bytes(bytes(changed), path=Path("m"))
        except CheckpointError as fault:
            assert str(fault).startswith("m: ")
        else:
            # Such as one blank for another, or the last digit of a float that has too many.
            assert read == MANIFEST


def test_no_root_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no manifest\.json: it was never committed"):
        read_manifest(tmp_path)


def test_a_later_version_is_refused_and_an_unknown_field_is_not() -> None:
    from bigtrain.checkpoint.manifest import _seal

    document = json.loads(MANIFEST.to_bytes())
    del document["checksum"]
    sealed = _seal({**document, "added_later": 1})
    assert Manifest.from_bytes(sealed, path=Path("m")) == MANIFEST
    with pytest.raises(CheckpointError, match="not a manifest of version 1"):
        Manifest.from_bytes(_seal({**document, "version": 2}), path=Path("m"))


def test_a_hyperparameter_that_is_no_plain_value_is_named() -> None:
    groups = ({"params": [], "lr": object()},)
    with pytest.raises(CheckpointError, match=r"param_groups\.lr is a object"):
        dataclasses.replace(MANIFEST, param_groups=groups).to_bytes()


@pytest.mark.parametrize("name", ["/etc/passwd", "../other/file", "weights/../../x"])
def test_a_part_names_no_file_outside_of_its_checkpoint(name: str) -> None:
    digest = FileDigest(size=1, blocks=bytes(16))
    with pytest.raises(CheckpointError, match="outside of the checkpoint"):
        Part.from_bytes(Part(rank=0, files={name: digest}).to_bytes())


def _sealed(**changes: object) -> bytes:
    from bigtrain.checkpoint.manifest import _seal

    document = json.loads(MANIFEST.to_bytes())
    del document["checksum"]
    return _seal({name: value for name, value in {**document, **changes}.items() if value != "-"})


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"[" * 100_000, "not a whole manifest"),
        (b"[]", "not a whole manifest"),
        (_sealed(uuid="-"), "not a manifest: no 'uuid'"),
        (_sealed(created=5), "not a manifest: created is 5"),
        (_sealed(world_size="4"), "not a manifest: world_size is '4'"),
        (_sealed(progress={"step": "7"}), "not a manifest: progress.step is '7'"),
        (_sealed(progress=[]), "not a manifest: "),
        (_sealed(parts=["a"]), "not a manifest: "),
        (_sealed(parts={"a": 1}), "not a manifest: "),
        (_sealed(param_groups={"x": 1}), "not a manifest: no 'dict'"),
        (_sealed(nodes=[{"host": "a", "ranks": [-1]}]), "not a manifest: "),
        (_sealed(nodes=3), "not a manifest: "),
    ],
)
def test_a_sealed_root_of_another_shape_is_refused_in_words(data: bytes, said: str) -> None:
    with pytest.raises(CheckpointError, match=f"^m: {re.escape(said)}"):
        Manifest.from_bytes(data, path=Path("m"))


@pytest.mark.parametrize(
    "part",
    [
        b"[" * 100_000,
        b"{}",
        b"[1]",
        PART.to_bytes().replace(b"[2, 3]", b"[-2, 3]").replace(b"[2,3]", b"[-2,3]"),
        PART.to_bytes().replace(b'"files":{', b'"files":{"x":[1],'),
        PART.to_bytes().replace(b'"objects":[]', b'"objects":[1]'),
    ],
)
def test_a_part_of_another_shape_is_refused_in_words(tmp_path: Path, part: bytes) -> None:
    name = "manifest/rank-00000.json"
    (tmp_path / "manifest").mkdir()
    (tmp_path / name).write_bytes(part)
    root = dataclasses.replace(MANIFEST, parts={name: (len(part), hash_bytes(part).hex())})

    with pytest.raises(CheckpointError, match=f"{name}: not a part of a manifest: "):
        read_part(tmp_path, name, manifest=root)


def test_a_root_of_any_number_of_ranks_takes_no_memory() -> None:
    assert 3 in own_ranks(dataclasses.replace(MANIFEST, world_size=10**12))
