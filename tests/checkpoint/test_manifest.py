from __future__ import annotations

import json
from pathlib import Path

import pytest

from bigtrain.checkpoint.blocks import FileDigest
from bigtrain.checkpoint.items import StoredItem
from bigtrain.checkpoint.manifest import (
    Manifest,
    Part,
    Progress,
    StoredTensor,
    read_manifest,
)
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
    import dataclasses

    groups = ({"params": [], "lr": object()},)
    with pytest.raises(CheckpointError, match=r"param_groups\.lr is a object"):
        dataclasses.replace(MANIFEST, param_groups=groups).to_bytes()


@pytest.mark.parametrize("name", ["/etc/passwd", "../other/file", "weights/../../x"])
def test_a_part_names_no_file_outside_of_its_checkpoint(name: str) -> None:
    digest = FileDigest(size=1, blocks=bytes(16))
    with pytest.raises(CheckpointError, match="outside of the checkpoint"):
        Part.from_bytes(Part(rank=0, files={name: digest}).to_bytes())
