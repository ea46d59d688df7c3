"""Which tensors of a DCP directory are the model's: torch keeps by which path it came to each."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict

from bigtrain.checkpoint.consolidate import consolidate
from bigtrain.checkpoint.foreign import read_foreign
from bigtrain.checkpoint.formats.dcp import read_dcp
from bigtrain.checkpoint.formats.dcp_keys import TOP_LEVEL
from bigtrain.checkpoint.source import open_source
from bigtrain.errors import CheckpointError

State = dict[str, Any]


class Body(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(3, 4)
        self.head = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x).relu())


class TwoHeads(nn.Module):
    """`model.head` and `head`."""

    def __init__(self) -> None:
        super().__init__()
        self.model = Body()
        self.head = nn.Linear(4, 2)


class App:
    """What torch's tutorial saves."""

    def __init__(self, state: State) -> None:
        self.state = state

    def state_dict(self) -> State:
        return self.state

    def load_state_dict(self, state: State) -> None:
        raise NotImplementedError


def trained() -> tuple[State, State]:
    """The states of a model and of its optimizer."""
    torch.manual_seed(0)
    model = Body()
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    return get_state_dict(model, optimizer)


def save(state: State, path: Path) -> Path:
    dcp.save(state, checkpoint_id=str(path), no_dist=True)
    return path


def forget_paths(path: Path) -> None:
    """As a planner leaves it that does not flatten."""
    metadata = pickle.loads((path / ".metadata").read_bytes())
    metadata.planner_data = None
    (path / ".metadata").write_bytes(pickle.dumps(metadata))


def assert_written(source: Path, expected: State, tmp_path: Path, *, weights: str = "model") -> str:
    """The weights are those, and no others; what kind the source was."""
    output = tmp_path / f"out-{weights}"
    summary = consolidate(source, output, weights=weights)
    ours = load_file(output / "model.safetensors")
    assert ours.keys() == expected.keys()
    assert all(torch.equal(ours[name], value) for name, value in expected.items())
    return summary.kind


@pytest.mark.parametrize("knows_paths", [True, False])
def test_a_head_in_the_model_and_one_beside_it_stay_two(tmp_path: Path, knows_paths: bool) -> None:
    state = TwoHeads().state_dict()
    source = save(dict(state), tmp_path / "in")
    if not knows_paths:
        forget_paths(source)
    assert_written(source, state, tmp_path)
    assert {name for name, _ in read_foreign(source).index.entries} == state.keys()


def test_a_bare_state_dict_whose_names_all_begin_with_model_keeps_them(tmp_path: Path) -> None:
    state = {f"model.{name}": value for name, value in Body().state_dict().items()}
    assert_written(save(dict(state), tmp_path / "in"), state, tmp_path)


def test_two_keys_that_mean_one_name_are_refused(tmp_path: Path) -> None:
    state = {"model": {"ema.w": torch.zeros(3)}, "ema": {"w": torch.ones(3)}}
    source = save(state, tmp_path / "in")
    with pytest.raises(CheckpointError, match=r"metadata: .*ema\.w is the weight of ema\.w, and"):
        consolidate(source, tmp_path / "out")


def wrapped() -> dict[str, State]:
    """Ways to save a model with more beside it, of which only the model's weights are weights."""
    model, optimizer = trained()
    step, rng = torch.tensor(5), torch.get_rng_state()
    return {
        "an app": {"app": App({"model": model, "optim": optimizer})},
        "loose": {"model": model, "optimizer": optimizer, "rng_state": rng, "step": step},
        "state_dict": {"model_state_dict": model, "optimizer_state_dict": optimizer},
        "opt": {"model": model, "opt": optimizer},
        "lightning": {"state_dict": model, "optimizer": optimizer},
        "fabric": {"model": model, "optimizer_0": optimizer},
        "composer": {
            "state": {"model": model, "optimizers": {"AdamW": optimizer}},
            "rng": {"a": rng},
        },
        "any names": {"net": model, "trainer": optimizer},
        "ddp": {f"module.{name}": value for name, value in model.items()},
        "torchtitan": {**model, "optimizer": optimizer, "train_state": {"step": step}},
    }


@pytest.mark.parametrize("way", wrapped())
def test_the_models_weights_and_nothing_else_are_taken(tmp_path: Path, way: str) -> None:
    source = save(wrapped()[way], tmp_path / "in")
    assert_written(source, trained()[0], tmp_path)
    assert len(open_source(source).sets) == 1


def test_an_optimizer_of_any_name_is_read_with_its_groups(tmp_path: Path) -> None:
    model, optimizer = trained()
    source = save({"app": App({"model": model, "trainer": optimizer})}, tmp_path / "in")
    index = read_foreign(source).index
    kinds = {"weight", "step", "exp_avg", "exp_avg_sq"}
    assert {name: set(kinds) for name, kinds in index.by_name.items()} == dict.fromkeys(
        model, kinds
    )
    assert index.param_groups is not None
    assert [sorted(group["params"]) for group in index.param_groups] == [sorted(model)]


def test_of_two_models_with_an_optimizer_each_one_is_chosen(tmp_path: Path) -> None:
    model, optimizer = trained()
    state = {"g": model, "d": model, "opt_g": optimizer, "opt_d": optimizer}
    source = save(state, tmp_path / "in")
    assert_written(source, model, tmp_path, weights="d")
    with pytest.raises(CheckpointError, match="no weights named 'model'; it has: g, d"):
        consolidate(source, tmp_path / "out")
    assert read_dcp(source).param_groups is None


def test_a_set_goes_by_its_last_name_and_the_only_one_is_the_model(tmp_path: Path) -> None:
    averages = {"w": torch.ones(3)}
    both = save({"app": {"model": {"w": torch.zeros(3)}, "ema": averages}}, tmp_path / "both")
    assert "(app.model, app.ema)" in assert_written(both, averages, tmp_path, weights="ema")
    alone = save({"ema": averages}, tmp_path / "alone")
    assert "(ema)" in assert_written(alone, averages, tmp_path)


def test_what_may_be_the_model_or_lie_beside_it_is_left_to_the_user(tmp_path: Path) -> None:
    state = {"w": torch.zeros(3), "net": {"v": torch.ones(3)}}
    source = save(dict(state), tmp_path / "in")
    with pytest.raises(
        CheckpointError, match=f"no weights named 'model'; it has: {TOP_LEVEL}, net"
    ):
        consolidate(source, tmp_path / "out")
    assert_written(source, {"w": state["w"]}, tmp_path, weights=TOP_LEVEL)
    assert_written(source, state["net"], tmp_path, weights="net")


@pytest.mark.parametrize(
    "path", [(), ("a", "b"), ("model.a", 5), ("model", object()), 7, ["model"]]
)
def test_paths_that_do_not_lead_to_their_keys_are_not_believed(tmp_path: Path, path: Any) -> None:
    source = save(
        {"model": {"a": torch.ones(3)}, "optim": {"state.a.m": torch.ones(3)}}, tmp_path / "in"
    )
    metadata = pickle.loads((source / ".metadata").read_bytes())
    metadata.planner_data = {**metadata.planner_data, "model.a": path}
    (source / ".metadata").write_bytes(pickle.dumps(metadata))
    assert_written(source, {"a": torch.ones(3)}, tmp_path)
    assert read_dcp(source).by_name == {"a": ("m", "weight")}


def test_keys_that_somebody_joined_are_told_by_their_names(tmp_path: Path) -> None:
    state = {"model.a": torch.ones(3), "optim.state.a.m": torch.ones(3)}
    assert_written(save(state, tmp_path / "in"), {"a": torch.ones(3)}, tmp_path)
