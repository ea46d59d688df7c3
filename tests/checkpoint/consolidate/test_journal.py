"""What the journal says is believed up to the first line that no consolidation wrote."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from bigtrain.checkpoint.consolidate import consolidate
from bigtrain.checkpoint.consolidate.journal import Staging
from bigtrain.errors import CheckpointError
from tests.checkpoint.consolidate.test_consolidate import plain

ENTRY: dict[str, Any] = {"file": "model.safetensors", "end": 1, "xxh3": "", "infinite": 0}
GARBLED = {
    "empty": {},
    "no file": {"end": 1, "name": "b", "xxh3": "", "infinite": 0},
    "no hash": {"file": "model.safetensors", "end": 1, "name": "b", "infinite": 0},
    "a field too many": {**ENTRY, "name": "b", "more": 1},
    "a list for the name": {**ENTRY, "name": ["b"]},
    "a list for the file": {**ENTRY, "name": "b", "file": []},
    "a text for the end": {**ENTRY, "name": "b", "end": "1"},
    "null for a count": {**ENTRY, "name": "b", "infinite": None},
}


@pytest.mark.parametrize("garbled", GARBLED)
def test_a_garbled_line_ends_the_journal_as_a_torn_one_does(garbled: str, tmp_path: Path) -> None:
    Staging(tmp_path / "out", fingerprint="x", resume=False).close()
    lines = [{**ENTRY, "name": "a"}, GARBLED[garbled], {**ENTRY, "name": "c"}]
    with (tmp_path / "out.partial" / "journal.jsonl").open("a") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)
    with Staging(tmp_path / "out", fingerprint="x", resume=True) as again:
        assert again.file("model.safetensors").hashes == {"a": ""}


def test_after_a_garbled_line_the_rest_is_written_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = {f"t{i}": torch.randn(50) for i in range(4)}
    source = plain(tmp_path / "in", tensors)

    def fails(staging: Staging) -> None:
        raise CheckpointError("cut short")

    with monkeypatch.context() as patch:
        patch.setattr(Staging, "commit", fails)
        with pytest.raises(CheckpointError, match="cut short"):
            consolidate(source, tmp_path / "out")
    journal = tmp_path / "out.partial" / "journal.jsonl"
    lines = journal.read_text().splitlines()
    assert len(lines) == 5
    journal.write_text("\n".join([*lines[:2], '{"file": 1}', *lines[3:]]) + "\n")

    consolidate(source, tmp_path / "out", resume=True, verify=True)

    ours = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(ours[name], value) for name, value in tensors.items())
