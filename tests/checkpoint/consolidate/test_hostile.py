"""Directories that somebody made to mislead, or that were put together from parts of others."""

from __future__ import annotations

import json
import os
import pickle
import re
import resource
import subprocess
import sys
from collections.abc import Callable
from itertools import product
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.metadata import Metadata

from bigtrain.checkpoint.consolidate import consolidate
from bigtrain.errors import CheckpointError

_CONFIG = '{"model_type": "llama", "dtype": ["float32"], "torch_dtype": {"a": 1}}'


def sharded(directory: Path, suffix: str) -> Path:
    """Two shards, and an index that names tensors `a` and `b` in them."""
    directory.mkdir()
    names = [f"model-0000{k}-of-00002.{suffix}" for k in (1, 2)]
    for name, tensor in zip(names, "ab", strict=True):
        if suffix == "bin":
            torch.save({tensor: torch.ones(3)}, directory / name)
        else:
            save_file({tensor: torch.ones(3)}, directory / name)
    stem = "pytorch_model.bin" if suffix == "bin" else "model.safetensors"
    document = {"weight_map": dict(zip("ab", names, strict=True))}
    (directory / f"{stem}.index.json").write_text(json.dumps(document))
    return directory


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_a_shard_of_another_model_is_told_by_the_tensors_that_it_lacks(
    suffix: str, tmp_path: Path
) -> None:
    source = sharded(tmp_path / "in", suffix)
    consolidate(source, tmp_path / "whole")
    assert load_file(tmp_path / "whole" / "model.safetensors").keys() == {"a", "b"}

    shard = source / f"model-00002-of-00002.{suffix}"
    torch.save({"c": torch.ones(3)}, shard) if suffix == "bin" else save_file(
        {"c": torch.ones(3)}, shard
    )
    with pytest.raises(CheckpointError, match=r"index\.json: names b in model-00002-of-00002"):
        consolidate(source, tmp_path / "out")


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_a_whole_file_counts_before_an_index_that_was_left_beside_it(
    suffix: str, tmp_path: Path
) -> None:
    source = sharded(tmp_path / "in", suffix)
    if suffix == "bin":
        torch.save({"new": torch.ones(3)}, source / "pytorch_model.bin")
    else:
        save_file({"new": torch.ones(3)}, source / "model.safetensors")
    consolidate(source, tmp_path / "out")
    assert load_file(tmp_path / "out" / "model.safetensors").keys() == {"new"}


def test_precisions_in_a_configuration_that_are_none_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    save_file({"w": torch.ones(3)}, tmp_path / "in" / "model.safetensors")
    (tmp_path / "in" / "config.json").write_text(_CONFIG)
    consolidate(tmp_path / "in", tmp_path / "out", dtype="bf16")
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == json.loads(_CONFIG)


@pytest.mark.parametrize("name", ["../x", "/etc", "a\0b", "", "x" * 5000, "."])
def test_a_latest_that_names_no_directory_beside_it_is_no_lead(name: str, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "latest").write_text(name)
    with pytest.raises(CheckpointError, match="holds no checkpoint that is known here"):
        consolidate(tmp_path / "in", tmp_path / "out")


def test_what_is_no_file_among_the_templates_is_left_out(tmp_path: Path) -> None:
    templates = tmp_path / "in" / "additional_chat_templates"
    templates.mkdir(parents=True)
    save_file({"w": torch.ones(3)}, tmp_path / "in" / "model.safetensors")
    os.mkfifo(templates / "never-ends.jinja")
    (templates / "tool.jinja").write_text("{{ messages }}")
    summary = consolidate(tmp_path / "in", tmp_path / "out")
    assert summary.side_files == ("additional_chat_templates/tool.jinja",)


_LIMITED = """\
import sys
from bigtrain.checkpoint.consolidate import consolidate
consolidate(sys.argv[1], sys.argv[2])
"""


def test_a_file_beside_the_weights_takes_no_memory_however_large_it_is(tmp_path: Path) -> None:
    nbytes = 400 << 20
    (tmp_path / "in").mkdir()
    save_file({"w": torch.ones(3)}, tmp_path / "in" / "model.safetensors")
    with (tmp_path / "in" / "tokenizer.json").open("wb") as file:
        file.truncate(nbytes)
    subprocess.run(
        [sys.executable, "-c", _LIMITED, str(tmp_path / "in"), str(tmp_path / "out")],
        check=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (nbytes, nbytes)),
    )
    assert (tmp_path / "out" / "tokenizer.json").stat().st_size == nbytes


def test_a_limit_of_more_digits_than_a_number_has_is_none(tmp_path: Path) -> None:
    source = sharded(tmp_path / "in", "safetensors")
    consolidate(source, tmp_path / "out", max_shard_size="9" * 400 + "GB")
    assert (tmp_path / "out" / "model.safetensors").is_file()


def edited(directory: Path, edit: Callable[[Metadata], None]) -> Path:
    """A DCP checkpoint of one matrix and one vector, its metadata changed."""
    state = {"matrix": torch.arange(6.0).reshape(2, 3), "vector": torch.ones(3)}
    dcp.save(state, checkpoint_id=str(directory), no_dist=True)
    path = directory / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    edit(metadata)
    path.write_bytes(pickle.dumps(metadata))
    return directory


def of_storage(**fields: object) -> Callable[[Metadata], None]:
    def edit(metadata: Metadata) -> None:
        for each in metadata.storage_data.values():
            vars(each).update(fields)

    return edit


def of_matrix(**fields: object) -> Callable[[Metadata], None]:
    return lambda metadata: vars(metadata.state_dict_metadata["matrix"]).update(fields)


def of_piece(**fields: object) -> Callable[[Metadata], None]:
    return lambda metadata: vars(metadata.state_dict_metadata["matrix"].chunks[0]).update(fields)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (of_storage(relative_path="../a/__0_0.distcp"), "outside of itself"),
        (of_storage(relative_path="/etc/passwd"), "outside of itself"),
        (of_storage(relative_path="."), "outside of itself"),
        (of_storage(relative_path="a\0b"), "outside of itself"),
        (of_storage(offset=-1), "-1 where a number of bytes belongs"),
        (of_storage(offset=2**63), "where a number of bytes belongs"),
        (of_storage(length=2**62), "cut off"),
        (of_storage(offset="a"), "not the metadata of a DCP checkpoint"),
        (of_matrix(size=torch.Size([-2, 3])), "not the metadata of a DCP checkpoint"),
        (of_matrix(size=torch.Size([2**40, 3])), "incomplete"),
        (of_matrix(size=torch.Size([6])), "pieces of matrix are none of a tensor of"),
        (of_matrix(chunks=[]), "incomplete"),
        (of_matrix(chunks=7), "not the metadata of a DCP checkpoint"),
        (of_piece(offsets=torch.Size([1, 1])), "listed but not stored"),
        (of_piece(sizes=torch.Size([6, 1, 1])), "pieces of matrix are none of a tensor of"),
        (of_piece(sizes=torch.Size([-2, -3])), "incomplete|none of a tensor|not the float32"),
    ],
)
def test_metadata_of_dcp_that_can_not_be_is_refused(
    edit: Callable[[Metadata], None], message: str, tmp_path: Path
) -> None:
    source = edited(tmp_path / "in", edit)
    with pytest.raises(CheckpointError, match=message):
        consolidate(source, tmp_path / "out", trust_times=True)
    assert not (tmp_path / "out").exists()


def test_no_flipped_bit_in_a_records_header_moves_what_is_read(tmp_path: Path) -> None:
    """A header's lengths say where its payload begins: they may lead into another one's."""
    source = edited(tmp_path / "in", lambda _metadata: None)
    path = source / "__0_0.distcp"
    content = path.read_bytes()
    consolidate(source, tmp_path / "whole", trust_times=True)
    expected = (tmp_path / "whole" / "model.safetensors").read_bytes()
    headers = [match.start() for match in re.finditer(b"PK\x03\x04", content)]
    lengths = [at + byte for at in headers for byte in (26, 27, 28, 29)]
    refused = 0
    for number, (place, bit) in enumerate(product(lengths, range(8))):
        flipped = bytearray(content)
        flipped[place] ^= 1 << bit
        path.write_bytes(flipped)
        out = tmp_path / f"out-{number}"
        try:
            consolidate(source, out, trust_times=True)
        except CheckpointError:
            refused += 1
        else:
            assert (out / "model.safetensors").read_bytes() == expected, (place, bit)
    assert refused > len(lengths)
