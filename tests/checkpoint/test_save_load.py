"""What is saved is loaded to the last bit: any layout, any number of ranks, by us and by others."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from bigtrain.checkpoint.blocks import BLOCK_BYTES
from bigtrain.checkpoint.formats.committed import read_committed
from bigtrain.checkpoint.formats.dcp import read_dcp
from bigtrain.checkpoint.index import merge
from bigtrain.checkpoint.load import open_checkpoint
from bigtrain.checkpoint.manifest import read_manifest, read_parts
from bigtrain.errors import CheckpointError
from bigtrain.topology import RankInfo
from tests.checkpoint.stand_in import (
    ModelFiles,
    StandIn,
    assert_same_local_state,
    blank,
    make_state,
    run_ranks,
    save,
)

ALONE = RankInfo()


def save_on(world: RankInfo, target: Path, is_sharded: bool) -> None:
    save(target, StandIn(*make_state(), world=world, is_sharded=is_sharded))


def load_on(world: RankInfo, target: Path, is_sharded: bool) -> tuple[Any, ...]:
    engine = StandIn(*blank(make_state()), world=world, is_sharded=is_sharded)
    with open_checkpoint(target) as checkpoint:
        engine.load_local_state(checkpoint.source, optimizer=True)
        rng = checkpoint.rng_state(world.rank)
        found = (checkpoint.progress.step, checkpoint.scheduler_state(), checkpoint.scaler_state())
    expected = StandIn(*make_state(), world=world, is_sharded=is_sharded)
    assert_same_local_state(engine, expected)
    return (*found, None if rng is None else rng["rank"])


@pytest.mark.parametrize(
    ("written_by", "read_by"),
    [
        ((1, False), (1, False)),
        ((2, False), (3, True)),
        ((1, True), (1, False)),
        ((2, True), (1, False)),
        ((2, True), (2, True)),
        ((2, True), (3, True)),
        ((3, True), (2, True)),
    ],
    ids=lambda world: f"{world[0]}{'s' if world[1] else 'w'}",
)
def test_any_layout_and_size_is_read_by_any_other(
    tmp_path: Path, written_by: tuple[int, bool], read_by: tuple[int, bool]
) -> None:
    target = tmp_path / "checkpoint-3"
    run_ranks(written_by[0], save_on, target, written_by[1])
    results = run_ranks(read_by[0], load_on, target, read_by[1])
    for rank, (step, scheduler, scaler, rng_rank) in enumerate(results):
        assert step == 3
        assert scheduler == {"last_epoch": 3, "_last_lr": [1e-3, 3e-4]}
        assert scaler == {"scale": 1024.0}
        assert rng_rank == (rank if rank < written_by[0] else None)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-3"]


def large_state() -> tuple[torch.nn.Module, torch.optim.AdamW]:
    """72 MB with the optimizer's state."""
    model = torch.nn.Linear(2000, 3000, bias=False)
    optimizer = torch.optim.AdamW(model.parameters())
    model.weight.grad = torch.ones_like(model.weight)
    optimizer.step()
    return model, optimizer


def save_large(world: RankInfo, target: Path, is_sharded: bool) -> None:
    engine = StandIn(*large_state(), world=world, is_sharded=is_sharded)
    save(target, engine)


def load_large(world: RankInfo, target: Path) -> tuple[int, int]:
    """Bytes that a rank reads, and that its memory grows by at most."""
    engine = StandIn(*large_state(), world=world, is_sharded=True)
    read = 0
    real = os.preadv

    def preadv(fd: int, buffers: Any, offset: int) -> int:
        nonlocal read
        count = real(fd, buffers, offset)
        read += count
        return count

    os.preadv = preadv
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before = memory_kb("VmRSS")
    with open_checkpoint(target) as checkpoint:
        engine.load_local_state(checkpoint.source, optimizer=True)
    return read, (memory_kb("VmHWM") - before) * 1024


def memory_kb(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


@pytest.mark.parametrize(("written_by", "is_sharded"), [(1, False), (2, True)])
def test_a_rank_reads_its_own_bytes_and_takes_little_memory_for_it(
    tmp_path: Path, written_by: int, is_sharded: bool
) -> None:
    run_ranks(written_by, save_large, tmp_path / "c", is_sharded)
    share, edges = 72_000_000 // 4, 3 * 2 * BLOCK_BYTES  # of each of three tensors
    for read, grown in run_ranks(4, load_large, tmp_path / "c"):
        assert share <= read <= share + edges
        assert grown <= 3 * BLOCK_BYTES


def test_torch_reads_a_sharded_checkpoint(tmp_path: Path) -> None:
    run_ranks(3, save_on, tmp_path / "c", True)
    model, optimizer = make_state()
    for part in ("weights", "optimizer"):
        dcp_to_torch_save(tmp_path / "c" / part, tmp_path / f"{part}.pt")
    weights = torch.load(tmp_path / "weights.pt", weights_only=True)["model"]
    state = torch.load(tmp_path / "optimizer.pt", weights_only=True)["optim"]
    named = dict(model.named_parameters())
    assert weights.keys() == named.keys() | dict(model.named_buffers()).keys()
    for name, value in (*named.items(), *model.named_buffers()):
        assert torch.equal(weights[name], value) and weights[name].dtype == value.dtype
    for name, parameter in named.items():
        for kind, value in optimizer.state.get(parameter, {}).items():
            assert torch.equal(state["state"][name][kind], value)
    expected = StandIn(model, optimizer, world=ALONE, is_sharded=True).param_groups()
    assert state["param_groups"] == expected


def test_dcp_load_fills_a_model_from_a_sharded_checkpoint(tmp_path: Path) -> None:
    run_ranks(2, save_on, tmp_path / "c", True)
    model, _ = blank(make_state())
    unique = {name: value for name, value in model.state_dict().items() if name != "head.weight"}
    dcp.load({"model": unique}, checkpoint_id=str(tmp_path / "c" / "weights"), no_dist=True)
    expected = make_state()[0].state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())


def test_the_metadata_and_the_manifest_name_the_same_bytes(tmp_path: Path) -> None:
    run_ranks(2, save_on, tmp_path / "c", True)
    manifest = read_manifest(tmp_path / "c")
    parts = read_parts(tmp_path / "c", manifest=manifest)
    ours = read_committed(tmp_path / "c", manifest=manifest, parts=parts)
    theirs = merge([read_dcp(tmp_path / "c" / part) for part in ("weights", "optimizer")])
    theirs.check_tiling()
    assert theirs.param_groups == ours.param_groups
    assert len(ours.entries) == len(theirs.entries)
    for (name, kind), entry in ours.entries.items():
        other = theirs.entry(name, "weight" if kind == "buffer" else kind)
        assert (other.shape, other.dtype) == (entry.shape, entry.dtype)
        assert [(ours.files[e.file], e.offset, e.start, e.run) for e in entry.extents] == [
            (theirs.files[e.file], e.offset, e.start, e.run) for e in other.extents
        ]


def test_torch_and_safetensors_read_a_whole_checkpoint(tmp_path: Path) -> None:
    model, optimizer = make_state()
    save(tmp_path / "c", StandIn(model, optimizer, world=ALONE, is_sharded=False))
    names = {path.name for path in (tmp_path / "c").iterdir()}
    assert names == {
        "config.json",
        "manifest",
        "manifest.json",
        "model.safetensors",
        "optimizer.pt",
        "rng_state.pth",
        "scaler.pt",
        "scheduler.pt",
    }
    other_model, other = blank(make_state())
    other.load_state_dict(torch.load(tmp_path / "c" / "optimizer.pt", weights_only=True))
    other_model.load_state_dict(load_file(tmp_path / "c" / "model.safetensors"), strict=False)
    expected = StandIn(model, optimizer, world=ALONE, is_sharded=False)
    loaded = StandIn(other_model, other, world=ALONE, is_sharded=False)
    for group in other.param_groups:
        group.pop("param_names")
    assert_same_local_state(loaded, expected)


def test_ranks_of_a_whole_checkpoint_keep_their_random_state_as_transformers_does(
    tmp_path: Path,
) -> None:
    run_ranks(2, save_on, tmp_path / "c", False)
    assert (tmp_path / "c" / "rng_state_0.pth").is_file()
    assert (tmp_path / "c" / "rng_state_1.pth").is_file()
    with open_checkpoint(tmp_path / "c") as checkpoint:
        assert checkpoint.rng_state(1)["rank"] == 1  # type: ignore[index]


def test_weights_that_the_model_files_rename_cast_or_drop_are_kept_exactly(tmp_path: Path) -> None:
    model, optimizer = make_state()
    engine = StandIn(model, optimizer, world=ALONE, is_sharded=False)
    weights = {name: value.detach().clone() for name, value in model.named_parameters()}
    weights["prefix.head.weight"] = weights.pop("embedding.weight")
    weights["convolution.weight"] = weights["convolution.weight"].to(torch.bfloat16)
    weights["convolution.bias"] = weights["convolution.bias"].flip(0)
    del weights["frozen"]
    save(tmp_path / "c", engine, write_files=ModelFiles(engine, weights))
    extra = load_file(tmp_path / "c" / "training_weights.safetensors")
    assert set(extra) == {"convolution.weight", "convolution.bias", "frozen", "seen", "mask"}
    load_on(ALONE, tmp_path / "c", False)


def test_only_the_model_is_saved_when_asked(tmp_path: Path) -> None:
    for is_sharded in (False, True):
        target = tmp_path / f"c{is_sharded}"
        engine = StandIn(*make_state(), world=ALONE, is_sharded=is_sharded)
        save(target, engine, only_model=True)
        loaded = StandIn(*blank(make_state()), world=ALONE, is_sharded=is_sharded)
        with open_checkpoint(target) as checkpoint:
            assert checkpoint.source.param_groups is None
            assert checkpoint.scheduler_state() is None and checkpoint.scaler_state() == {}
            loaded.load_local_state(checkpoint.source, optimizer=False)
        assert_same_local_state(loaded, engine, optimizer=False)
        assert not list(target.glob("optim*"))


def test_a_read_casts_and_stays_within_the_tensor(tmp_path: Path) -> None:
    model, optimizer = make_state()
    save(tmp_path / "c", StandIn(model, optimizer, world=ALONE, is_sharded=True))
    with open_checkpoint(tmp_path / "c") as checkpoint:
        out = torch.empty(6, dtype=torch.bfloat16)
        checkpoint.source.read_into("embedding.weight", "weight", 7, out)
        assert torch.equal(out, model.embedding.weight.view(-1)[7:13].to(torch.bfloat16))
        with pytest.raises(CheckpointError, match=r"has 35 elements \(shape \(7, 5\)\)"):
            checkpoint.source.read_into("embedding.weight", "weight", 30, torch.empty(6))
        with pytest.raises(CheckpointError, match="has no exp_avg of frozen"):
            checkpoint.source.read_into("frozen", "exp_avg", 0, torch.empty(6))
        assert checkpoint.source.kinds("unknown") == {}
        assert checkpoint.source.kinds("seen") == {"buffer": torch.int64}


def test_a_step_that_is_reached_again_replaces_the_old_directory(tmp_path: Path) -> None:
    target = tmp_path / "checkpoint-3"
    save(target, StandIn(*make_state(seed=1), world=ALONE, is_sharded=True))
    save(target, StandIn(*make_state(seed=0), world=ALONE, is_sharded=True))
    load_on(ALONE, target, True)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-3"]
