"""Where the output goes and what becomes of the source: nothing of anybody else's is touched."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file

from bigtrain.checkpoint.consolidate import consolidate, journal, outlet
from bigtrain.checkpoint.consolidate.journal import Staging
from bigtrain.errors import CheckpointError, ConfigError


def plain(path: Path, **tensors: torch.Tensor) -> Path:
    path.mkdir(parents=True)
    save_file(tensors or {"w": torch.arange(5.0)}, path / "model.safetensors")
    return path


def no_space_at(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """The disk is full from so many writes on: the first that is, is done in part."""
    real, count = os.pwrite, [0]

    def pwrite(fd: int, data: bytes | memoryview, offset: int) -> int:
        count[0] += 1
        if count[0] == number:
            return real(fd, memoryview(data)[: max(1, len(data) // 2)], offset)
        if count[0] > number:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", pwrite)


@pytest.mark.parametrize("number", [1, 2])
def test_a_disk_that_fills_in_the_middle_of_a_write_keeps_what_resume_goes_on_from(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = plain(tmp_path / "in")  # its tensor is one write, its header another
    with monkeypatch.context() as patch:
        no_space_at(patch, number)
        with pytest.raises(CheckpointError, match="No space left on device"):
            consolidate(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()

    consolidate(source, tmp_path / "out", resume=True, verify=True)
    assert load_file(tmp_path / "out" / "model.safetensors")["w"].tolist() == [0, 1, 2, 3, 4]


def test_resume_with_still_too_little_space_keeps_what_there_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Of the second one, some is written. Room that is set apart would still be there.
    monkeypatch.setattr(outlet, "_set_apart", lambda *_: None)
    source = plain(tmp_path / "in", a=torch.randn(300_000), b=torch.randn(2_000_000))
    with monkeypatch.context() as patch:
        no_space_at(patch, 6)
        with pytest.raises(CheckpointError, match="No space left"):
            consolidate(source, tmp_path / "out")
    there = {path.name: path.stat().st_size for path in (tmp_path / "out.partial").iterdir()}
    with monkeypatch.context() as patch:
        patch.setattr(journal, "free_bytes", lambda _path: 10)
        with pytest.raises(CheckpointError, match="no space for"):
            consolidate(source, tmp_path / "out", resume=True)
    now = {path.name: path.stat().st_size for path in (tmp_path / "out.partial").iterdir()}
    assert now == there
    assert len((tmp_path / "out.partial" / "journal.jsonl").read_text().splitlines()) == 2


def test_a_disk_that_takes_no_more_entries_hides_no_fault(small_disk: Path) -> None:
    with (
        pytest.raises(CheckpointError, match="the fault itself"),
        Staging(small_disk / "out", fingerprint="x", resume=False) as staging,
    ):
        first = {"end": 1, "name": "a", "xxh3": "", "infinite": 0}
        staging.append([{"file": "model.safetensors", **first}])
        with (small_disk / "others").open("wb", buffering=0) as others, suppress(OSError):
            while True:
                others.write(bytes(4096))
        with pytest.raises(OSError, match="No space left on device"):
            staging.append([{"file": "model.safetensors", **first, "name": "w" * 5000}])
        raise CheckpointError("the fault itself")

    (small_disk / "others").unlink()
    with Staging(small_disk / "out", fingerprint="x", resume=True) as again:
        assert again.file("model.safetensors").hashes == {"a": ""}


def test_a_directory_that_is_called_like_the_staging_is_not_emptied(tmp_path: Path) -> None:
    source = plain(tmp_path / "in")
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "thesis.tex").write_text("years of work")
    for mine in ("thesis.tex", "journal.jsonl"):
        (tmp_path / "out.partial" / mine).write_text("years of work")
        for resume in (False, True):
            with pytest.raises(CheckpointError, match="holds files that no consolidation wrote"):
                consolidate(source, tmp_path / "out", resume=resume)
        assert (tmp_path / "out.partial" / mine).read_text() == "years of work"


def test_what_an_earlier_attempt_left_is_cleared_with_its_directories(tmp_path: Path) -> None:
    source = plain(tmp_path / "in")
    Staging(tmp_path / "out", fingerprint="x", resume=False).close()
    (tmp_path / "out.partial" / "additional_chat_templates").mkdir()
    (tmp_path / "out.partial" / "additional_chat_templates" / "a.jinja").write_text("")
    consolidate(source, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["model.safetensors"]


def test_one_that_comes_at_the_commit_takes_nothing_from_the_one_that_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = plain(tmp_path / "in")
    seen: list[str] = []
    real = journal.sync_directory

    def other_comes(path: Path) -> None:
        real(path)
        try:
            Staging(tmp_path / "out", fingerprint="other", resume=False).close()
        except CheckpointError as fault:
            seen.append(str(fault))
        else:
            seen.append("")

    monkeypatch.setattr(journal, "sync_directory", other_comes)
    consolidate(source, tmp_path / "out", remove_source=True)

    assert "is being written by another process" in seen[0]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["model.safetensors"]
    assert load_file(tmp_path / "out" / "model.safetensors")["w"].numel() == 5


def test_an_output_that_turns_up_while_it_is_made_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = plain(tmp_path / "in")
    real = Staging.commit

    def commit(staging: Staging) -> None:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "mine").write_text("keep")
        real(staging)

    with monkeypatch.context() as patch:
        patch.setattr(Staging, "commit", commit)
        with pytest.raises(CheckpointError, match=r"is whole, but can't be named .*out"):
            consolidate(source, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]

    shutil.rmtree(tmp_path / "out")
    consolidate(source, tmp_path / "out", resume=True)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["model.safetensors"]


def test_an_output_may_be_a_link_to_an_empty_directory_and_no_mount_point(tmp_path: Path) -> None:
    source = plain(tmp_path / "in")
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    consolidate(source, tmp_path / "link")
    assert (tmp_path / "real" / "model.safetensors").is_file()
    with pytest.raises(CheckpointError, match="is where a disk begins"):
        consolidate(source, "/proc")


def test_the_directory_one_is_in_can_be_the_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = plain(tmp_path / "in")
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path / "out")
    consolidate(source, ".")
    assert (tmp_path / "out" / "model.safetensors").is_file()


def beside_logs(source: Path) -> None:
    (source / "logs").mkdir()
    (source / "logs" / "run.jsonl").write_text("")


def beside_notes(source: Path) -> None:
    (source / "notes.txt").write_text("")


def beside_steps(source: Path) -> None:
    (source / "checkpoint-500").mkdir()
    (source / "checkpoint-500" / "optimizer.pt").write_text("")


@pytest.mark.parametrize(
    ("add", "named"),
    [(beside_logs, "logs/"), (beside_notes, r"notes\.txt"), (beside_steps, "checkpoint-500/")],
)
def test_a_source_is_not_removed_along_with_what_is_not_its_own(
    add: Callable[[Path], None], named: str, tmp_path: Path
) -> None:
    source = plain(tmp_path / "in")
    add(source)
    with pytest.raises(ConfigError, match=f"{named} in it are not known to belong to it"):
        consolidate(source, tmp_path / "out", remove_source=True)
    assert (source / "model.safetensors").is_file()
    assert not (tmp_path / "out").exists()


def test_a_source_behind_a_link_is_not_removed(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(plain(tmp_path / "in"))
    with pytest.raises(ConfigError, match="it is a link"):
        consolidate(tmp_path / "link", tmp_path / "out", remove_source=True)
    assert not (tmp_path / "out").exists()


def test_a_source_stays_that_has_more_than_the_output(tmp_path: Path) -> None:
    state = {"model": {"w": torch.zeros(3)}, "ema": {"w": torch.ones(3)}}
    dcp.save(state, checkpoint_id=str(tmp_path / "dcp"), no_dist=True)
    with pytest.raises(ConfigError, match=r"holds several sets of weights \(model, ema\)"):
        consolidate(tmp_path / "dcp", tmp_path / "out", weights="ema", remove_source=True)

    layer = "base_model.model.q_proj"
    names = [f"{layer}.lora_A.default.weight", f"{layer}.lora_B.default.weight"]
    weights = {name: torch.randn(2, 2) for name in [*names, f"{layer}.base_layer.weight"]}
    with pytest.raises(ConfigError, match="the model's weights beside the adapter"):
        consolidate(plain(tmp_path / "lora", **weights), tmp_path / "out", remove_source=True)

    source = plain(tmp_path / "large", w=torch.tensor([1e30, 1.0]))
    summary = consolidate(source, tmp_path / "out", dtype="fp16", remove_source=True)
    assert not summary.source_removed
    assert "was kept: it holds the values that became infinite" in summary.warnings[-1]
    assert (source / "model.safetensors").is_file()


def test_a_source_that_can_not_be_removed_is_said_after_the_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = plain(tmp_path / "in")

    def busy(path: Path) -> None:
        raise OSError(errno.EBUSY, "Device or resource busy", str(path))

    monkeypatch.setattr(shutil, "rmtree", busy)
    summary = consolidate(source, tmp_path / "out", remove_source=True)
    assert not summary.source_removed
    assert "could not be removed: " in summary.warnings[-1]
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_names_that_were_the_models_own_stay(tmp_path: Path) -> None:
    names = ["model.model.wte.weight", "model.model.ln_f.weight"]
    source = plain(tmp_path / "in", **{name: torch.randn(2) for name in names})
    consolidate(source, tmp_path / "guessed")
    assert all(not name.startswith("model.model.") for name in read(tmp_path / "guessed"))
    (source / "config.json").write_text("{}")
    consolidate(source, tmp_path / "out")
    assert sorted(read(tmp_path / "out")) == sorted(names)


def test_a_model_with_low_rank_layers_of_its_own_is_written_whole(tmp_path: Path) -> None:
    names = ["q_proj.base_layer.weight", "q_proj.lora_A.vision.weight", "norm.weight"]
    source = plain(tmp_path / "in", **{name: torch.randn(2, 2) for name in names})
    consolidate(source, tmp_path / "out")
    assert sorted(read(tmp_path / "out")) == sorted(names)


def read(output: Path) -> dict[str, Any]:
    return dict(load_file(output / "model.safetensors"))


def test_going_on_with_another_strength_of_the_adapter_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = "base_model.model.q_proj"
    weights = {
        f"{layer}.{name}.weight": torch.randn(4, 4)
        for name in ("lora_A.default", "lora_B.default", "base_layer")
    }
    source = plain(tmp_path / "in", **weights)
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8}
    (source / "adapter_config.json").write_text(json.dumps(config))
    with monkeypatch.context() as patch:
        no_space_at(patch, 2)
        with pytest.raises(CheckpointError, match="No space left"):
            consolidate(source, tmp_path / "out", merge_adapter=True)
    (source / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 16}))
    with pytest.raises(CheckpointError, match="begun from another source or with other options"):
        consolidate(source, tmp_path / "out", merge_adapter=True, resume=True)


def with_header(fields: str) -> bytes:
    text = ('{"w": {"dtype": "F32", ' + fields + "}}").encode()
    return len(text).to_bytes(8, "little") + text + bytes(8)


@pytest.mark.parametrize(
    "content",
    [
        with_header('"shape": [1], "data_offsets": ["0", 4]'),
        with_header('"shape": [1], "data_offsets": [0.0, 4.0]'),
        with_header('"shape": [-1, -1], "data_offsets": [0, 4]'),
        with_header('"shape": [true], "data_offsets": [0, 4]'),
        with_header('"shape": ["1"], "data_offsets": [0, 4]'),
        (200_000).to_bytes(8, "little") + b"[" * 200_000,
    ],
)
def test_a_malformed_header_is_refused_by_the_files_name(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: .*(malformed|damaged)"):
        consolidate(tmp_path / "in", tmp_path / "out")


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_a_malformed_index_or_configuration_is_refused(name: str, tmp_path: Path) -> None:
    source = plain(tmp_path / "in")
    (source / "config.json").write_text("[" * 100_000)
    with pytest.raises(CheckpointError, match=r"config\.json: not JSON"):
        consolidate(source, tmp_path / "out")
    (source / "model.safetensors").unlink()
    for names in ('{"a": 5}', "[" * 100_000):
        (source / f"{name}.index.json").write_text('{"weight_map": ' + names + "}")
        with pytest.raises(CheckpointError, match="not an index of weights; it is damaged"):
            consolidate(source, tmp_path / "out")
