"""`bigtrain inspect`: what a checkpoint is, whether it is whole, and how two differ."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch import nn
from typer.testing import CliRunner

from bigtrain.checkpoint.compare import distance
from bigtrain.checkpoint.inspect import inspect_checkpoint
from bigtrain.cli import app
from bigtrain.topology import RankInfo
from tests.checkpoint.stand_in import StandIn, make_state, run_ranks, save


def inspect(*arguments: object) -> tuple[int, str]:
    done = CliRunner().invoke(app, ["inspect", *map(str, arguments)])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.exit_code, done.stdout


def save_sharded(world: RankInfo, target: Path, seed: int = 0) -> None:
    save(target, StandIn(*make_state(seed), world=world, is_sharded=True))


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """Two ranks' checkpoint of step 3."""
    run_ranks(2, save_sharded, tmp_path / "checkpoint-3")
    return tmp_path / "checkpoint-3"


def flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


def test_engine_size_step_groups_and_tensors_are_told(sharded: Path) -> None:
    code, text = inspect(sharded, "--tensors")

    assert code == 0
    assert "written by   stand_in on 2 ranks" in text
    assert "step         3 (epoch 0.5, 36 samples seen)" in text
    assert "convolution.weight  exp_avg  float32  3×5×3  180 bytes" in text
    assert "group 1" in text
    assert "weight_decay=0.1" in text


def test_json_holds_the_same_for_programs(sharded: Path) -> None:
    values = json.loads(inspect(sharded, "--json", "--verify")[1])

    assert (values["step"], values["world_size"], values["committed"]) == (3, 2, True)
    assert values["faults"] == []
    shapes = {(t["name"], t["kind"]): t["shape"] for t in values["tensors"]}
    assert shapes["frozen", "weight"] == [3, 11]
    assert [group["weight_decay"] for group in values["param_groups"]] == [0.1, 0.0]


def test_a_whole_directory_shows_its_newest(sharded: Path) -> None:
    assert str(sharded) in inspect(sharded.parent)[1]


def test_verifying_names_the_broken_file_and_the_tensors_in_it(sharded: Path) -> None:
    assert inspect(sharded, "--verify")[0] == 0
    path = max((sharded / "weights").glob("*.distcp"), key=lambda file: file.stat().st_size)
    flip(path, path.stat().st_size // 2)

    code, text = inspect(sharded, "--verify")

    assert code == 1
    assert f"{path}: bytes 0 to" in text
    assert "holds embedding.weight (weight)" in text


def test_verifying_names_a_missing_file(sharded: Path) -> None:
    (sharded / "scheduler.pt").unlink()

    code, text = inspect(sharded, "--verify")

    assert code == 1
    assert f"{sharded / 'scheduler.pt'}: is missing" in text


def test_what_differs_is_told_with_how_much(tmp_path: Path, sharded: Path) -> None:
    other = tmp_path / "other" / "checkpoint-3"
    model, optimizer = make_state()
    with torch.no_grad():
        model.scale += 0.25
        model.convolution.weight[0, 0, 0] -= 2
    save(other, StandIn(model, optimizer, world=RankInfo(), is_sharded=False))

    code, text = inspect(sharded, "--diff", other)

    assert code == 1
    assert "2 tensors differ" in text
    assert "scale (weight): differs: 1 elements, at most by 0.25" in text
    assert "convolution.weight (weight): differs: 1 elements, at most by 2" in text
    assert inspect(sharded, "--diff", sharded)[0] == 0


def test_differences_are_the_same_without_numpy() -> None:
    import random

    import numpy

    generator = random.Random(0)
    for mine, theirs in (
        ("float32", "float32"), ("float16", "float32"), ("bfloat16", "bfloat16"),
        ("bfloat16", "float64"), ("int64", "int64"), ("uint8", "int8"),
    ):  # fmt: skip
        first = torch.tensor([generator.uniform(0, 9) for _ in range(50)])
        second = first.clone()
        second[::7] += 1.5
        if "int" not in mine:
            first[3] = second[3] = first[4] = second[5] = float("nan")
            first[6] = float("inf")
        raw = [
            bytearray(t.to(getattr(torch, dtype)).view(torch.uint8).numpy().tobytes())
            for t, dtype in ((first, mine), (second, theirs))
        ]
        arguments = (raw[0], mine, raw[1], theirs)
        plain = distance(*arguments, numpy=None)
        assert plain[0] > 0
        assert distance(*arguments, numpy=numpy) == plain, (mine, theirs)


def test_a_damaged_step_that_is_passed_over_is_a_fault(sharded: Path) -> None:
    later = sharded.with_name("checkpoint-9")
    shutil.copytree(sharded, later)
    manifest = json.loads((later / "manifest.json").read_text())
    assert inspect(sharded.parent, "--verify")[0] == 0
    (later / "manifest.json").write_text(json.dumps(manifest | {"uuid": "edited"}))

    code, text = inspect(sharded.parent, "--verify")

    assert code == 1
    assert f"passed over  {later}: " in text
    assert f"{later}: passed over: " in text
    assert str(sharded) in text


def test_only_steps_and_epochs_that_are_known_are_shown(tmp_path: Path) -> None:
    model = nn.Linear(8, 8)
    optimizer = torch.optim.AdamW(model.parameters())
    for _ in range(4):
        model(torch.ones(8)).sum().backward()
        optimizer.step()
    path = tmp_path / "checkpoint_1"  # accelerate counts saves
    path.mkdir()
    torch.save(model.state_dict(), path / "pytorch_model.bin")
    torch.save(optimizer.state_dict(), path / "optimizer.bin")
    dcp.save({"model": model.state_dict()}, checkpoint_id=tmp_path / "run-7", no_dist=True)

    assert "step         4\n" in inspect(path)[1]
    assert json.loads(inspect(path, "--json")[1])["epoch"] is None
    assert "step         unknown\n" in inspect(tmp_path / "run-7")[1]


def test_a_checkpoint_that_is_still_written_is_shown_as_far_as_it_is(sharded: Path) -> None:
    staging = sharded.rename(sharded.with_name("checkpoint-3.tmp"))
    (staging / "manifest.json").unlink()
    part = next(staging.rglob("rank-00000.json*"))
    part.unlink()

    code, text = inspect(staging)

    assert code == 0
    assert "not committed" in text
    assert "the shares of 1 rank" in text
    assert inspect_checkpoint(staging).ranks_missing == (0,)

    code, text = inspect(staging, "--verify")
    assert code == 1
    assert f"{staging}: was never committed" in text
    next((staging / "weights").glob("__1_*.distcp")).unlink()
    assert "__1_0.distcp: is missing" in inspect(staging, "--verify")[1]
    (staging / "manifest" / "rank-00001.json").write_text('{"files": {"a": 5}}')
    assert inspect(staging)[0] == 0


def test_others_checksums_are_checked_where_there_are_any(tmp_path: Path) -> None:
    path = tmp_path / "dcp"
    dcp.save({"model": nn.Linear(8, 8).state_dict()}, checkpoint_id=path, no_dist=True)
    assert inspect(path, "--verify")[0] == 0
    file = next(path.glob("*.distcp"))
    storage = file.read_bytes().index(b"data/0") + 200
    flip(file, storage)

    code, text = inspect(path, "--verify")

    assert code == 1
    assert str(file) in text
    assert "(weight)" in text


def test_a_path_without_a_checkpoint_is_one_clear_line(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["inspect", str(tmp_path)])

    assert done.exit_code != 0
    assert str(tmp_path) in str(done.exception)


def test_what_a_terminal_would_obey_is_shown_as_text(tmp_path: Path) -> None:
    header = json.dumps(
        {"\x1b[2J\ud800": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}
    ).encode()
    content = len(header).to_bytes(8, "little") + header + bytes(4)
    (tmp_path / "model.safetensors").write_bytes(content)
    done = CliRunner().invoke(app, ["inspect", str(tmp_path), "--tensors"])
    assert done.exit_code == 0
    assert r"\x1b[2J\ud800  weight  float32" in done.stdout


@pytest.mark.parametrize(
    ("weights", "optimizer", "engine"),
    [
        ("pytorch_model_fsdp.bin", "optimizer.bin", "FSDP (full state dict)"),
        ("pytorch_model.bin", "optimizer.pt", "DDP"),
    ],
)
def test_a_directory_shows_of_others_newest_what_that_itself_shows(
    tmp_path: Path, weights: str, optimizer: str, engine: str
) -> None:
    step = tmp_path / "checkpoint-3"
    step.mkdir()
    model = nn.Linear(2, 3)
    adam = torch.optim.AdamW(model.parameters())
    model(torch.ones(2)).sum().backward()
    adam.step()
    torch.save(model.state_dict(), step / weights)
    torch.save(adam.state_dict(), step / optimizer)
    for rank in range(2):
        torch.save({}, step / f"rng_state_{rank}.pth")
    save_file(model.state_dict(), tmp_path / "model.safetensors")

    code, text = inspect(tmp_path)

    assert (code, text) == inspect(step)
    assert f"written by   {engine} on 2 ranks" in text
    assert "exp_avg_sq" in text
    assert json.loads(inspect(tmp_path, "--json")[1])["samples_seen"] is None
