"""Ways in which today's tools lose data without a word. Here each is refused, or right."""

from __future__ import annotations

import os
import pickle
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from torch.distributed.checkpoint import FileSystemWriter

from bigtrain.checkpoint.consolidate import consolidate, removal, run
from bigtrain.checkpoint.formats.deepspeed import read_deepspeed
from bigtrain.errors import BigtrainError, CheckpointError, ConfigError

Written = Callable[[int], Path]
OLD = 1_000_000_000
"""A time long ago, in seconds."""


def write_dcp(path: Path, *, seed: int = 0) -> dict[str, torch.Tensor]:
    """Several files, of which none holds all of the others' names."""
    torch.manual_seed(seed)
    state = {f"layer.{i}.weight": torch.randn(40, 30) for i in range(4)}
    state["scalar"] = torch.tensor(float(seed))
    writer = FileSystemWriter(str(path), single_file_per_rank=False)
    dcp.save(dict(state), storage_writer=writer, no_dist=True)
    return state


def flip_a_bit(path: Path, *, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def largest(folder: Path, pattern: str) -> Path:
    return max(folder.glob(pattern), key=lambda path: path.stat().st_size)


def assert_nothing_left(output: Path) -> None:
    assert not output.exists()
    assert not output.with_name(f"{output.name}.partial").exists()


def keep_times(path: Path) -> None:
    """As if the change had been there when the checkpoint was saved."""
    os.utime(path, (OLD, OLD))


def test_a_flipped_bit_in_a_distcp_is_refused_and_the_tensor_named(tmp_path: Path) -> None:
    write_dcp(tmp_path / "dcp")
    broken = largest(tmp_path / "dcp", "*.distcp")
    flip_a_bit(broken, at=broken.stat().st_size // 2)
    keep_times(broken)

    with pytest.raises(CheckpointError, match=rf"{broken.name}: bytes .*layer\.\d\.weight"):
        consolidate(tmp_path / "dcp", tmp_path / "out")
    assert_nothing_left(tmp_path / "out")


@pytest.mark.parametrize("kind", ["zero2", "zero3"])
def test_a_flipped_bit_in_a_zero_file_is_refused(
    written: Written, kind: str, tmp_path: Path
) -> None:
    step = tmp_path / "global_step2"
    shutil.copytree(written(3) / f"{kind}-3" / step.name, step)
    entry = read_deepspeed(step).index.entry("first", "weight")
    extent = entry.extents[0]
    broken = read_deepspeed(step).index.files[extent.file]
    flip_a_bit(broken, at=extent.offset + 1)

    with pytest.raises(CheckpointError, match=rf"{broken.name}: bytes .*in them: .*first"):
        consolidate(step, tmp_path / "out")
    assert_nothing_left(tmp_path / "out")


def test_a_flipped_bit_in_what_is_not_copied_is_found_by_verify(
    written: Written, tmp_path: Path
) -> None:
    step = tmp_path / "global_step2"
    shutil.copytree(written(3) / "zero3-3" / step.name, step)
    found = read_deepspeed(step)
    extent = found.index.entry("first", "exp_avg").extents[0]
    flip_a_bit(found.index.files[extent.file], at=extent.offset)

    consolidate(step, tmp_path / "out")
    with pytest.raises(CheckpointError, match="not as it was written"):
        consolidate(step, tmp_path / "verified", verify=True)
    assert_nothing_left(tmp_path / "verified")


@pytest.mark.parametrize("which", [0, 1, -1])
def test_a_missing_file_of_dcp_is_named(which: int, tmp_path: Path) -> None:
    write_dcp(tmp_path / "dcp")
    missing = sorted((tmp_path / "dcp").glob("*.distcp"))[which]
    missing.unlink()

    with pytest.raises(CheckpointError, match=rf"{missing.name}: is missing"):
        consolidate(tmp_path / "dcp", tmp_path / "out")
    assert_nothing_left(tmp_path / "out")


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_a_missing_rank_of_zero_is_named(written: Written, rank: int, tmp_path: Path) -> None:
    step = tmp_path / "global_step2"
    shutil.copytree(written(3) / "zero3-3" / step.name, step)
    (step / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt").unlink()

    with pytest.raises(CheckpointError, match=f"rank {rank} of 3 are missing"):
        consolidate(step, tmp_path / "out")


def test_files_of_a_larger_world_are_refused(written: Written, tmp_path: Path) -> None:
    step = tmp_path / "global_step2"
    shutil.copytree(written(3) / "zero3-3" / step.name, step)
    name = "bf16_zero_pp_rank_{}_mp_rank_00_optim_states.pt"
    shutil.copy(step / name.format(0), step / name.format(3))

    with pytest.raises(CheckpointError, match="saved by 3 ranks, but holds files of rank 3 too"):
        consolidate(step, tmp_path / "out")


def test_a_dcp_that_was_half_overwritten_is_refused(tmp_path: Path) -> None:
    first = write_dcp(tmp_path / "dcp", seed=1)
    for path in (tmp_path / "dcp").iterdir():
        keep_times(path)
    write_dcp(tmp_path / "next", seed=2)
    overwritten = sorted((tmp_path / "next").glob("*.distcp"))[0]
    shutil.copy(overwritten, tmp_path / "dcp" / overwritten.name)

    with pytest.raises(CheckpointError, match=r"newer than \.metadata"):
        consolidate(tmp_path / "dcp", tmp_path / "out")

    mixed = tmp_path / "trusted"
    consolidate(tmp_path / "dcp", mixed, trust_times=True)
    ours = load_file(mixed / "model.safetensors")
    assert not all(torch.equal(ours[name], value) for name, value in first.items())


def test_ranks_of_two_steps_are_refused(written: Written, tmp_path: Path) -> None:
    step = tmp_path / "global_step2"
    shutil.copytree(written(3) / "zero3-3" / step.name, step)
    name = "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt"
    found = torch.load(step / name, weights_only=False)
    for state in found["optimizer_state_dict"]["optimizer_state_dict"]["state"].values():
        state["step"] += 1
    torch.save(found, step / name)

    with pytest.raises(CheckpointError, match=r"mixes several steps \(by rank: 2.0, 3.0, 2.0\)"):
        consolidate(step, tmp_path / "out")


@pytest.mark.parametrize("kind", ["zero1", "zero2", "zero3"])
def test_every_parameter_group_keeps_its_own_hyperparameters(written: Written, kind: str) -> None:
    found = read_deepspeed(written(3) / f"{kind}-3" / "global_step2")

    groups = found.index.param_groups
    assert groups is not None
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
    assert [sorted(group["params"]) for group in groups] == [
        ["first", "three"],
        ["bias", "scale", "single"],
    ]


def test_the_source_goes_only_after_the_output_is_synced_and_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = write_dcp(tmp_path / "dcp")
    done: list[str] = []
    for module, name in ((os, "fsync"), (run, "read_back"), (run.Staging, "commit")):
        real = getattr(module, name)
        monkeypatch.setattr(
            module, name, lambda *a, _real=real, _name=name: (done.append(_name), _real(*a))[1]
        )
    real_rmtree = shutil.rmtree
    monkeypatch.setattr(
        removal.shutil, "rmtree", lambda path, **k: (done.append("remove"), real_rmtree(path, **k))
    )

    consolidate(tmp_path / "dcp", tmp_path / "out", remove_source=True)

    assert not (tmp_path / "dcp").exists()
    assert done.index("fsync") < done.index("read_back") < done.index("commit")
    assert done[-2:] == ["fsync", "remove"]
    ours = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(ours[name], value) for name, value in state.items())


def test_the_source_stays_when_the_output_can_not_be_read_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_dcp(tmp_path / "dcp")
    real = run.read_back

    def spoil(files: object, written: object, where: Path) -> None:
        flip_a_bit(where / "model.safetensors", at=-1)
        real(files, written, where)  # type: ignore[arg-type]

    monkeypatch.setattr(run, "read_back", spoil)
    with pytest.raises(CheckpointError, match="not on the disk as it was written"):
        consolidate(tmp_path / "dcp", tmp_path / "out", remove_source=True)
    assert (tmp_path / "dcp" / ".metadata").exists()
    assert_nothing_left(tmp_path / "out")


def test_the_source_is_not_removed_from_under_the_output(tmp_path: Path) -> None:
    write_dcp(tmp_path / "dcp")
    with pytest.raises(ConfigError, match="lies inside"):
        consolidate(tmp_path / "dcp", tmp_path / "dcp" / "out", remove_source=True)


class Hostile:
    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (self.command,)


@pytest.mark.parametrize("name", [".metadata", "optim", "model", "state_dict"])
def test_no_pickle_is_run(written: Written, name: str, tmp_path: Path) -> None:
    proof = tmp_path / "executed"
    hostile = Hostile(f"touch {proof}")
    source = tmp_path / "source"
    if name == ".metadata":
        write_dcp(source)
        (source / name).write_bytes(pickle.dumps(hostile))
    elif name == "state_dict":
        source.mkdir()
        torch.save({"weight": torch.ones(3), "note": hostile}, source / "pytorch_model.bin")
    else:
        shutil.copytree(written(3) / "zero2-3" / "global_step2", source)
        for path in source.glob(f"*{name}*"):
            found = torch.load(path, weights_only=False)
            torch.save({**found, "note": hostile}, path)

    try:
        consolidate(source, tmp_path / "out", verify=True)
    except BigtrainError as fault:
        assert name == ".metadata", fault
    assert not proof.exists()
    assert not list(tmp_path.glob("executed*"))


def test_a_zip_that_is_cut_off_is_refused(written: Written, tmp_path: Path) -> None:
    step = tmp_path / "global_step2"
    shutil.copytree(written(3) / "zero2-3" / step.name, step)
    broken = largest(step, "*optim_states.pt")
    broken.write_bytes(broken.read_bytes()[:-100])

    with pytest.raises(CheckpointError, match=rf"{broken.name}: .*cut off or damaged"):
        consolidate(step, tmp_path / "out")


def test_a_file_without_checksums_is_read_and_said_so(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    torch.save({"weight": torch.arange(6.0)}, source / "pytorch_model.bin")
    with zipfile.ZipFile(source / "pytorch_model.bin") as zipped:
        assert all(info.CRC for info in zipped.infolist())

    summary = consolidate(source, tmp_path / "out")

    assert summary.source_checked == "the CRC-32 of all 1 records that were read holds"
    shutil.copytree(tmp_path / "out", tmp_path / "again")
    summary = consolidate(tmp_path / "again", tmp_path / "third", verify=True)
    assert "stores no checksums" in summary.source_checked
