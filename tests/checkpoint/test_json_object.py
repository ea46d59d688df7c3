"""Malformed headers, indexes and configurations end in one message, whatever they hold."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest

from bigtrain.checkpoint.consolidate import consolidate
from bigtrain.errors import CheckpointError


def with_header(path: Path, text: bytes) -> Path:
    path.mkdir()
    (path / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(4))
    return path


@pytest.mark.parametrize("form", ["safetensors", "torch"])
@pytest.mark.parametrize(
    "fields",
    [
        {"dtype": "F32", "shape": [1], "data_offsets": 4},
        {"dtype": ["F32"], "shape": [1], "data_offsets": [0, 4]},
        "a tensor",
    ],
)
def test_an_entry_of_another_type_is_malformed(fields: Any, form: str, tmp_path: Path) -> None:
    source = with_header(tmp_path / "in", json.dumps({"a": fields}).encode())
    with pytest.raises(CheckpointError, match=r"safetensors: the header's entry of 'a' is malform"):
        consolidate(source, tmp_path / "out", format=form)


@pytest.mark.parametrize("form", ["safetensors", "torch"])
def test_a_name_that_is_no_text_is_refused_in_text(form: str, tmp_path: Path) -> None:
    fields = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
    source = with_header(tmp_path / "in", json.dumps({"a\ud800": fields}).encode())
    with pytest.raises(CheckpointError, match=r"'a\\ud800' can't be a tensor's name") as refusal:
        consolidate(source, tmp_path / "out", format=form)
    assert str(refusal.value).encode()


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("named", [["x"], None, {"x": 1}])
def test_an_index_that_names_no_files_is_damaged(file: str, named: Any, tmp_path: Path) -> None:
    index = tmp_path / "in" / f"{file}.index.json"
    index.parent.mkdir()
    index.write_text(json.dumps({"weight_map": {"a": named, "b": named}}))
    with pytest.raises(CheckpointError, match="not an index of weights; it is damaged"):
        consolidate(index.parent, tmp_path / "out")
