"""DeepSpeed's own files are read to the last element, or refused by name."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from bigtrain.checkpoint.blocks import FilePool
from bigtrain.checkpoint.elements import read_elements
from bigtrain.checkpoint.formats.deepspeed import DeepSpeedCheckpoint, read_deepspeed
from bigtrain.errors import CheckpointError

Written = Callable[[int], Path]
MOMENTS = ("exp_avg", "exp_avg_sq")


def read_tensor(found: DeepSpeedCheckpoint, name: str, kind: str) -> torch.Tensor:
    entry = found.index.entry(name, kind)
    out = torch.empty(entry.shape, dtype=getattr(torch, entry.dtype.name))
    view = memoryview(out.view(-1).view(torch.uint8).numpy())
    with contextlib.closing(FilePool()) as pool:
        read_elements(found.index, entry, pool, start=0, out=view)
    return out


def load_ranks(step: Path, world: int) -> list[Mapping[str, Any]]:
    names = [f"bf16_zero_pp_rank_{r}_mp_rank_00_optim_states.pt" for r in range(world)]
    loaded = [torch.load(step / name, weights_only=False) for name in names]
    return [each["optimizer_state_dict"] for each in loaded]


@pytest.mark.parametrize("kind", ["zero1", "zero2"])
@pytest.mark.parametrize("moment", MOMENTS)
def test_moments_of_partitioned_groups(written: Written, kind: str, moment: str) -> None:
    step = written(3) / f"{kind}-3" / "global_step2"
    found = read_deepspeed(step)
    found.index.check_tiling()
    shapes = torch.load(step / "mp_rank_00_model_states.pt", weights_only=False)["param_shapes"]
    states = [rank["base_optimizer_state"]["state"] for rank in load_ranks(step, 3)]
    for group, names in enumerate(shapes):
        whole, at = torch.cat([state[group][moment] for state in states]), 0
        for name, shape in names.items():
            expected = whole[at : at + shape.numel()].view(shape)
            assert torch.equal(read_tensor(found, name, moment), expected), name
            at += shape.numel()


@pytest.mark.parametrize("moment", MOMENTS)
def test_moments_of_sharded_parameters(written: Written, moment: str) -> None:
    step = written(3) / "zero3-3" / "global_step2"
    found = read_deepspeed(step)
    found.index.check_tiling()
    name = "zero_pp_rank_0_mp_rank_00_model_states.pt"
    shapes = torch.load(step / name, weights_only=False)["param_shapes"]
    states = [rank["optimizer_state_dict"]["state"] for rank in load_ranks(step, 3)]
    for group, names in enumerate(shapes):
        at = 0
        for name, shape in names.items():
            share = -(-shape.numel() // 3)
            pieces = [state[group][moment][at : at + share] for state in states]
            expected = torch.cat(pieces)[: shape.numel()].view(shape)
            assert torch.equal(read_tensor(found, name, moment), expected), name
            at += share


@pytest.mark.parametrize("kind", ["zero1", "zero2", "zero3"])
def test_the_step_and_who_is_tied_are_known(written: Written, kind: str) -> None:
    found = read_deepspeed(written(3) / f"{kind}-3" / "global_step2")
    assert (found.stage, found.world_size, found.step) == (int(kind[-1]), 3, 2)
    assert found.aliases == {"tied": "first"}
    assert read_tensor(found, "three", "step").item() == 2
    assert found.opaque == frozenset()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("layer_0_expert_1_mp_rank_00_model_states.pt", "mixture-of-experts parameters"),
        ("expp_rank_0_mp_rank_00_optim_states.pt", "mixture-of-experts parameters"),
        ("layer_01-model_00-model_states.pt", "pipeline engine"),
        ("bf16_zero_pp_rank_0_mp_rank_01_optim_states.pt", "tensor parallelism over 2 ranks"),
        ("zero_pp_rank_0_mp_rank_00_optim_states.pt", "has two files of rank 0"),
    ],
)
def test_what_can_not_be_read_is_refused_with_the_reason(
    written: Written, name: str, message: str, tmp_path: Path
) -> None:
    step = tmp_path / "step"
    shutil.copytree(written(3) / "zero2-3" / "global_step2", step)
    (step / name).write_bytes(b"")
    with pytest.raises(CheckpointError, match=message):
        read_deepspeed(step)


def test_missing_model_states_are_named(written: Written, tmp_path: Path) -> None:
    for kind, pattern, message in (
        ("zero3", "zero_pp_rank_1_*model_states.pt", "the model states of rank 1 of 3 are missing"),
        ("zero2", "mp_rank_00_model_states.pt", "has no file of model states"),
    ):
        step = tmp_path / kind
        shutil.copytree(written(3) / f"{kind}-3" / "global_step2", step)
        for path in step.glob(pattern):
            path.unlink()
        with pytest.raises(CheckpointError, match=message):
            read_deepspeed(step)
