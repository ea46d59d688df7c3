"""DeepSpeed's files with values that DeepSpeed doesn't write: one message, and nothing lost."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from bigtrain.checkpoint.consolidate import consolidate
from bigtrain.checkpoint.formats.deepspeed import read_deepspeed
from bigtrain.errors import CheckpointError

States = dict[str, Any]
Edit = Callable[[States, States], object]
"""Of the optimizer's states and the model's."""


def written(step: Path, edit: Edit, *, stage: int = 2) -> Path:
    """A step of one rank, with two weights and a buffer."""
    masters = torch.arange(6.0)
    optim: States = {"zero_stage": stage, "partition_count": [1], "group_paddings": [0]}
    moments = {"exp_avg": torch.zeros(6), "step": torch.tensor(3.0)}
    inner = {"state": {0: moments}, "param_groups": [{"params": [0], "lr": 1.0}]}
    if stage == 3:
        optim |= {"partition_count": 1, "fp32_flat_groups": [masters]}
        optim |= {"optimizer_state_dict": inner}
    else:
        optim |= {"single_partition_of_fp32_groups": [masters], "base_optimizer_state": inner}
    model: States = {
        "module": {"a": torch.zeros(2), "b": torch.zeros(2, 2), "mean": torch.ones(2)},
        "buffer_names": ["mean"],
        "param_shapes": [{"a": torch.Size([2]), "b": torch.Size([2, 2])}],
        "shared_params": {},
        "global_steps": 3,
    }
    edit(optim, model)
    step.mkdir()
    torch.save({"optimizer_state_dict": optim}, step / optim_file(0))
    whole = "mp_rank_00_model_states.pt"
    torch.save(model, step / (whole if stage < 3 else f"zero_pp_rank_0_{whole}"))
    return step


def optim_file(rank: int) -> str:
    return f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"


@pytest.mark.parametrize("stage", [2, 3])
def test_as_deepspeed_writes_it_it_is_read(stage: int, tmp_path: Path) -> None:
    source = written(tmp_path / "step", lambda optim, model: None, stage=stage)
    consolidate(source, tmp_path / "out")
    ours = load_file(tmp_path / "out" / "model.safetensors")
    assert {name: value.tolist() for name, value in ours.items()} == {
        "a": [0, 1],
        "b": [[2, 3], [4, 5]],
        "mean": [1, 1],
    }


@pytest.mark.parametrize("count", ["x", [], [[1]], 0, -1, [True], None, 1.0])
def test_a_number_of_ranks_that_is_none_is_refused(count: Any, tmp_path: Path) -> None:
    step = written(tmp_path / "step", lambda optim, model: optim.update(partition_count=count))
    with pytest.raises(CheckpointError, match=r"which is no number of them \(partition_count\)"):
        read_deepspeed(step)


@pytest.mark.parametrize("count", [10**9, 10**30])
def test_however_many_ranks_are_missing_a_few_are_listed(count: int, tmp_path: Path) -> None:
    step = written(tmp_path / "step", lambda optim, model: optim.update(partition_count=count))
    with pytest.raises(
        CheckpointError, match=f"ranks 1, 2, 3, 4, 5, 6, 7, 8 and {count - 9} more of {count} are"
    ):
        read_deepspeed(step)


def test_however_high_a_files_rank_is_a_few_missing_ones_are_listed(tmp_path: Path) -> None:
    step = written(tmp_path / "step", lambda optim, model: None)
    (step / optim_file(10**12)).write_bytes(b"")
    with pytest.raises(CheckpointError, match=f"ranks 1, 2, .* and {10**12 - 9} more of"):
        read_deepspeed(step)


NO_STEP = "not laid out as a step of DeepSpeed's "
UNLISTED = r"where tensors are listed by name \({}\); they are damaged"
STRANGE: dict[str, tuple[Edit, str]] = {
    "no state": (lambda optim, model: optim["base_optimizer_state"].pop("state"), NO_STEP),
    "no groups": (lambda optim, model: optim["base_optimizer_state"].pop("param_groups"), NO_STEP),
    "a text": (lambda optim, model: optim.update(base_optimizer_state=["x"]), NO_STEP),
    "endless step": (
        lambda optim, model: optim["base_optimizer_state"]["state"][0].update(step=10**400),
        "",
    ),
    "names alone": (
        lambda optim, model: model.update(param_shapes=[["a"]]),
        UNLISTED.format("param_shapes"),
    ),
    "a text's shape": (lambda optim, model: model.update(param_shapes=[{"a": "zz"}]), NO_STEP),
    "negative shape": (lambda optim, model: model["param_shapes"][0].update(b=(-2, -2)), NO_STEP),
    "negative frozen shape": (
        lambda optim, model: model.update(
            frozen_param_shapes={"f": (-2, -2)}, frozen_param_fragments={"f": torch.ones(4)}
        ),
        NO_STEP,
    ),
    "negative padding": (
        lambda optim, model: optim.update(param_alignment_paddings=[[-1, 0]]),
        NO_STEP,
    ),
    "tied as a list": (
        lambda optim, model: model.update(shared_params=["x"]),
        UNLISTED.format("shared_params"),
    ),
    "module as a list": (
        lambda optim, model: model.update(module=[1]),
        UNLISTED.format("module"),
    ),
}


@pytest.mark.parametrize("strange", STRANGE)
def test_what_deepspeed_would_not_write_ends_in_one_message(strange: str, tmp_path: Path) -> None:
    edit, message = STRANGE[strange]
    step = written(tmp_path / "step", edit)
    if message:
        with pytest.raises(CheckpointError, match=message):
            read_deepspeed(step)
    else:
        assert read_deepspeed(step).index.entry("b", "weight").shape == (2, 2)


@pytest.mark.parametrize("key", ["module", "shared_params", "frozen_param_shapes", "param_shapes"])
def test_names_that_are_no_text_are_refused(key: str, tmp_path: Path) -> None:
    value = {"module": torch.ones(2), "shared_params": "a"}.get(key, torch.Size([2]))

    def edit(optim: States, model: States) -> None:
        listed = model.setdefault(key, {})
        (listed[0] if isinstance(listed, list) else listed)[5] = value

    step = written(tmp_path / "step", edit)
    with pytest.raises(CheckpointError, match=rf"under 5, which is no text \({key}\)"):
        consolidate(step, tmp_path / "out")


def quantised() -> torch.Tensor:
    return torch.quantize_per_tensor(torch.randn(3), 0.1, 0, torch.qint8)


@pytest.mark.filterwarnings("ignore:.*[Qq]uantize")
@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("is_buffer", [False, True])
@pytest.mark.parametrize(
    "make",
    [
        quantised,
        lambda: torch.eye(3).to_sparse(),
        lambda: {"w": torch.ones(2)},
        lambda: [quantised()],
    ],
    ids=["quantised", "sparse", "dict", "list"],
)
def test_what_is_no_plain_tensor_is_not_left_out_silently(
    make: Callable[[], Any], is_buffer: bool, stage: int, tmp_path: Path
) -> None:
    def edit(optim: States, model: States) -> None:
        model["module"]["odd"] = make()
        model["buffer_names"] += ["odd"] * is_buffer

    step = written(tmp_path / "step", edit, stage=stage)
    with pytest.raises(CheckpointError, match="odd is no plain tensor"):
        consolidate(step, tmp_path / "out")


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("module", [None, {}])
def test_without_its_module_buffers_are_missing(module: Any, stage: int, tmp_path: Path) -> None:
    step = written(tmp_path / "step", lambda optim, model: model.update(module=module), stage=stage)
    with pytest.raises(CheckpointError, match="name buffers, but no module"):
        consolidate(step, tmp_path / "out")


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("module", [None, {}])
def test_without_buffers_the_module_is_not_needed(module: Any, stage: int, tmp_path: Path) -> None:
    def edit(optim: States, model: States) -> None:
        model.update(module=module, buffer_names=[])

    found = read_deepspeed(written(tmp_path / "step", edit, stage=stage))
    assert {name for name, _ in found.index.entries} == {"a", "b"}


@pytest.mark.filterwarnings("ignore:.*[Qq]uantize")
@pytest.mark.parametrize("stage", [2, 3])
def test_what_a_module_keeps_beside_its_tensors_is_no_hindrance(stage: int, tmp_path: Path) -> None:
    """Nor are placeholders of weights that the optimizer has, and buffers that a hook renames."""

    def edit(optim: States, model: States) -> None:
        model["module"] |= {
            "_extra_state": {"amax": torch.ones(1)},
            "layer.version": 2,
            "a": quantised(),
        }
        model["module"]["layer._extra_state"] = [quantised()]
        model["buffer_names"].append("wrapper.mean")

    found = read_deepspeed(written(tmp_path / "step", edit, stage=stage))
    assert {name for name, _ in found.index.entries} == {"a", "b", "mean"}
