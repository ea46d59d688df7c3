"""What is written equals, bit for bit, what each format's own tool makes of the same checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from bigtrain.checkpoint.consolidate import consolidate

ZERO = ["zero1", "zero1_fp32", "zero2", "zero2_fp32", "zero3", "zero3_fp32"]
DCP = ["dcp_bare", "dcp_both", "fsdp"]
WORLDS = [3, *(pytest.param(world, marks=pytest.mark.slow) for world in (1, 2, 4, 5, 6, 7))]
Written = Callable[[int], Path]

pytestmark = pytest.mark.parametrize("world", WORLDS)


def both(folder: Path, name: str, output: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What was written, and what the peer says."""
    consolidate(folder / name, output, verify=True)
    expected = torch.load(folder / f"{name}.expected.pt")
    tensors = {name: value for name, value in expected.items() if isinstance(value, Tensor)}
    return load_file(output / "model.safetensors"), tensors


def assert_equal(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    for name, tensor in theirs.items():
        assert ours[name].shape == tensor.shape, name
        assert torch.equal(ours[name], tensor), name


@pytest.mark.parametrize("kind", ZERO)
def test_zero_equals_zero_to_fp32(written: Written, world: int, kind: str, tmp_path: Path) -> None:
    ours, theirs = both(written(world), f"{kind}-{world}", tmp_path / "out")

    assert_equal({**ours, "mean": ours["mean"].float()}, theirs)
    assert {name: value.dtype for name, value in theirs.items() if name != "mean"} == {
        name: ours[name].dtype for name in theirs if name != "mean"
    }


@pytest.mark.parametrize("kind", ZERO)
def test_zero_keeps_what_zero_to_fp32_drops(
    written: Written, world: int, kind: str, tmp_path: Path
) -> None:
    ours, theirs = both(written(world), f"{kind}-{world}", tmp_path / "out")

    assert "tied" not in theirs
    assert torch.equal(ours["tied"], ours["first"])
    assert ours["frozen"].shape == (4, 3)
    if "frozen" in theirs:  # at stage 1 it is not
        assert torch.equal(ours["frozen"], theirs["frozen"])


@pytest.mark.parametrize("kind", DCP)
def test_dcp_equals_torchs_and_accelerates_tools(
    written: Written, world: int, kind: str, tmp_path: Path
) -> None:
    ours, theirs = both(written(world), f"{kind}-{world}", tmp_path / "out")

    assert ours.keys() == theirs.keys()
    assert_equal(ours, theirs)
    assert [ours[name].dtype for name in theirs] == [value.dtype for value in theirs.values()]


@pytest.mark.parametrize("kind", ["llama_zero2", "llama_zero3"])
def test_from_pretrained_gives_the_training_models_logits(
    written: Written, world: int, kind: str, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    folder = written(world)
    consolidate(folder / f"{kind}-{world}", tmp_path / "out", max_shard_size="20KB")

    names = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    model, report = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", output_loading_info=True, dtype=torch.float32
    )
    assert names[0] == f"model-00001-of-{len(names):05d}.safetensors"
    assert not report["missing_keys"] and not report["unexpected_keys"]
    with torch.no_grad():
        logits = model(input_ids=torch.arange(12)[None]).logits
    assert torch.equal(logits, torch.load(folder / f"{kind}-{world}.logits.pt"))
