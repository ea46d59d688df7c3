"""--remove-source: a checkpoint goes, and nothing that came into it or is newer."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from bigtrain.checkpoint.consolidate import consolidate
from bigtrain.errors import ConfigError
from tests.checkpoint.consolidate.test_consolidate import plain, save_on
from tests.checkpoint.stand_in import run_ranks

WEIGHTS = {"w": torch.randn(3)}


def test_of_an_own_checkpoint_the_manifest_says_what_belongs_to_it(tmp_path: Path) -> None:
    source = tmp_path / "run" / "checkpoint-3"
    run_ranks(2, save_on, source)
    shutil.copytree(source, tmp_path / "run" / "checkpoint-2")
    (tmp_path / "run" / "logs").mkdir()
    plain(source / "model", WEIGHTS)
    with pytest.raises(ConfigError, match=r"model/model\.safetensors in it are not known"):
        consolidate(source, tmp_path / "out", remove_source=True)
    shutil.rmtree(source / "model")

    summary = consolidate(source, tmp_path / "out", remove_source=True)

    assert summary.source_removed and summary.verified
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"checkpoint-2", "logs"}


def test_an_older_step_goes_only_where_it_was_named(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run_ranks(1, save_on, run / "checkpoint-3")
    shutil.copytree(run / "checkpoint-3", run / "checkpoint-9")
    (run / "checkpoint-9" / "manifest.json").write_text("{}")
    with pytest.raises(ConfigError, match="newer ones can't be used; give --step if it is meant"):
        consolidate(run, tmp_path / "out", remove_source=True)
    assert (run / "checkpoint-3" / "manifest.json").is_file()
    assert consolidate(run, tmp_path / "out", step=3, remove_source=True).source_removed
    assert [path.name for path in run.iterdir()] == ["checkpoint-9"]


@pytest.mark.parametrize("kind", ["zero2-2", "zero3-2", "fsdp-2", "dcp_both-2"])
def test_foreign_checkpoints_hold_nothing_that_is_unknown(
    kind: str, written: Callable[[int], Path], tmp_path: Path
) -> None:
    source = shutil.copytree(written(2) / kind, tmp_path / "in")
    summary = consolidate(source, tmp_path / "out", remove_source=True, trust_times=True)
    assert summary.source_removed and not summary.source.exists()


@pytest.mark.parametrize(
    "name",
    [
        "model_1.safetensors",
        "ema.safetensors",
        "adapter_model.safetensors",
        "pytorch_model.bin",
        "pytorch_model_1.bin",
        "model-00001-of-00002.safetensors",
    ],
)
def test_weights_that_were_not_read_are_kept(name: str, tmp_path: Path) -> None:
    source = plain(tmp_path / "in", WEIGHTS)
    (source / name).write_bytes(b"another model's")
    with pytest.raises(ConfigError, match=f"{name} in it are not known to belong to it"):
        consolidate(source, tmp_path / "out", remove_source=True)
    assert (source / name).exists() and not (tmp_path / "out").exists()


def test_an_index_goes_with_the_shards_that_it_names_alone(tmp_path: Path) -> None:
    shards = {"a.safetensors": {"a": torch.ones(2)}, "b.safetensors": {"b": torch.ones(3)}}
    source = tmp_path / "in"
    source.mkdir()
    for name, tensors in shards.items():
        save_file(tensors, source / name)
    index = source / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "a.safetensors", "b": "b.safetensors"}}))
    other = source / "model_1.safetensors.index.json"
    for text in ('{"weight_map": {"a": "a.safetensors", "z": "z.safetensors"}}', "damaged"):
        other.write_text(text)
        with pytest.raises(ConfigError, match=r"model_1\.safetensors\.index\.json in it are not"):
            consolidate(source, tmp_path / "out", remove_source=True)
    other.unlink()
    assert consolidate(source, tmp_path / "out", remove_source=True).source_removed


def test_what_comes_into_the_source_while_it_is_copied_stays(tmp_path: Path) -> None:
    source = plain(tmp_path / "in", WEIGHTS)
    summary = consolidate(
        source,
        tmp_path / "out",
        remove_source=True,
        progress=lambda _: source.joinpath("notes.txt").touch(),
    )
    assert not summary.source_removed and (source / "notes.txt").exists()
    assert "was kept: notes.txt in it are not known" in summary.warnings[-1]
