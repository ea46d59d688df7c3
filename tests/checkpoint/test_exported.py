"""A model is replaced whole: the old one stays until the new one is on the disk."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from bigtrain.checkpoint import exported
from bigtrain.checkpoint.exported import exporting
from bigtrain.errors import CheckpointError
from tests.checkpoint.test_failures import in_child, kill_at_file_event
from tests.trainer.samples import tiny_llama


def export(directory: Path, *, seed: int, shards: bool = False) -> None:
    model = tiny_llama(seed=seed)
    with exporting(directory, nbytes=100_000) as staging:
        model.save_pretrained(staging, max_shard_size="40KB" if shards else "1GB")


def seed_of(directory: Path) -> int | None:
    """Which model `from_pretrained` loads, whole; None where it finds none."""
    try:
        loaded = LlamaForCausalLM.from_pretrained(directory).state_dict()
    except OSError:
        return None
    for seed in (0, 1):
        whole = tiny_llama(seed=seed).state_dict()
        if all(torch.equal(value, whole[name]) for name, value in loaded.items()):
            return seed
    raise AssertionError("a mix of two models was loaded")


@pytest.mark.parametrize(("before", "after"), [(False, True), (True, False), (True, True)])
def test_the_new_model_is_loaded_whatever_files_the_old_one_had(
    tmp_path: Path, before: bool, after: bool
) -> None:
    export(tmp_path, seed=0, shards=before)
    (tmp_path / "thesis.pdf").touch()
    export(tmp_path, seed=1, shards=after)
    assert seed_of(tmp_path) == 1
    assert (tmp_path / "thesis.pdf").exists()
    assert not list(tmp_path.glob(".export-*"))


@pytest.mark.parametrize("shards", [False, True], ids=["one file", "shards"])
@pytest.mark.parametrize("every", [11, pytest.param(1, marks=pytest.mark.slow)])
def test_killed_at_any_file_boundary_no_mix_of_two_models_is_left(
    tmp_path: Path, shards: bool, every: int
) -> None:
    events, found = 0, []
    while True:
        directory = tmp_path / str(events)
        export(directory, seed=0, shards=shards)

        def exporting_again(directory: Path = directory, number: int = events) -> None:
            model = tiny_llama(seed=1)
            kill_at_file_event(number)
            with exporting(directory, nbytes=100_000) as staging:
                model.save_pretrained(staging, max_shard_size="40KB" if shards else "1GB")

        status = in_child(exporting_again)
        found.append(seed_of(directory))
        assert found[-1] is not None
        export(directory, seed=0, shards=shards)
        assert not list(directory.glob(".export-*"))
        if os.WIFEXITED(status):
            break
        assert os.WTERMSIG(status) == signal.SIGKILL
        events += every
    assert found[0] == 0
    assert found[-1] == 1


def test_killed_after_any_file_was_placed_the_old_model_is_loaded_or_the_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, found = exported._place, []
    for last in range(100):
        directory = tmp_path / str(last)
        export(directory, seed=0, shards=True)
        left = iter(range(last))

        def place_until(staged: Path, target: Path, left: Iterator[int] = left) -> None:
            if next(left, None) is None:
                raise KeyboardInterrupt
            place(staged, target)

        monkeypatch.setattr(exported, "_place", place_until)
        with contextlib.suppress(KeyboardInterrupt):
            export(directory, seed=1, shards=True)
            found.append(seed_of(directory))
            break
        found.append(seed_of(directory))
        monkeypatch.setattr(exported, "_place", place)
        export(directory, seed=0, shards=True)
        assert seed_of(directory) == 0
        assert not list(directory.glob("model-*.*.safetensors")), "left under a passing name"
    assert found == sorted(found, key=lambda seed: seed is None or seed)
    assert set(found) == {0, 1}


def test_without_links_the_new_shards_keep_other_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(source: Path, target: Path) -> None:
        raise PermissionError(errno.EPERM, "no links here")

    export(tmp_path, seed=0, shards=True)
    monkeypatch.setattr(os, "link", refuse)
    export(tmp_path, seed=1, shards=True)
    assert seed_of(tmp_path) == 1
    export(tmp_path, seed=0)
    assert seed_of(tmp_path) == 0
    assert [path.name for path in tmp_path.glob("model*")] == ["model.safetensors"]


def test_what_another_living_process_exports_stays(tmp_path: Path) -> None:
    with exporting(tmp_path, nbytes=1) as other:
        (other / "config.json").write_text("theirs")
        export(tmp_path, seed=0)
        assert (other / "config.json").read_text() == "theirs"
    assert (tmp_path / "config.json").read_text() == "theirs"


def test_what_fails_in_the_middle_leaves_the_old_model(tmp_path: Path) -> None:
    export(tmp_path, seed=0)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with (
        pytest.raises(RuntimeError, match="in the middle"),
        exporting(tmp_path, nbytes=1) as staging,
    ):
        (staging / "model.safetensors").write_bytes(b"half")
        raise RuntimeError("in the middle")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("is_foreseen", [True, False])
def test_a_full_disk_is_told_and_leaves_the_old_model(small_disk: Path, is_foreseen: bool) -> None:
    export(small_disk, seed=0)
    free = os.statvfs(small_disk)
    (small_disk / "ballast").write_bytes(bytes(free.f_bavail * free.f_frsize - (60 << 10)))
    with (
        pytest.raises(CheckpointError, match=r"no space for the model in .*: it takes .* are free"),
        exporting(small_disk, nbytes=100_000 if is_foreseen else 1) as staging,
    ):
        tiny_llama(seed=1).save_pretrained(staging)
    assert seed_of(small_disk) == 0
    assert not list(small_disk.glob(".export-*"))
