"""Files of `torch.save`: all that they hold is written, or told of."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from bigtrain.checkpoint.consolidate import consolidate
from bigtrain.checkpoint.foreign import read_foreign
from bigtrain.errors import CheckpointError, ConfigError
from tests.checkpoint.test_torch_file import Hostile

A, B = torch.ones(2), torch.full((3,), 2.0)


class Averages:
    def __init__(self) -> None:
        self.shadow = {"a": A}


def saved(directory: Path, value: Any, **options: Any) -> Path:
    """A directory whose `pytorch_model.bin` holds the value."""
    directory.mkdir()
    torch.save(value, directory / "pytorch_model.bin", **options)
    return directory


def written(directory: Path) -> dict[str, list[float]]:
    """The tensors of a consolidated model."""
    return {k: v.tolist() for k, v in load_file(directory / "model.safetensors").items()}


def tagged() -> nn.Parameter:
    parameter = nn.Parameter(B.clone())
    parameter.tag = "kept by torch.save"  # type: ignore[attr-defined]
    return parameter


def test_a_parameter_with_attributes_is_a_tensor_like_others(tmp_path: Path) -> None:
    source = saved(tmp_path / "in", {"a": A, "b": tagged()})
    assert b"_rebuild_parameter_with_state" in (source / "pytorch_model.bin").read_bytes()
    consolidate(source, tmp_path / "out")
    assert written(tmp_path / "out") == {"a": A.tolist(), "b": B.tolist()}


@pytest.mark.filterwarnings("ignore:.*quantize.*are deprecated")
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: torch.eye(3).to_sparse(), r"bin: x is no dense tensor: .*_rebuild_sparse_tensor"),
        (
            lambda: torch.quantize_per_tensor(B, 0.1, 0, torch.qint8),
            r"bin: x is no dense tensor: .*_rebuild_qtensor",
        ),
        (
            lambda: torch.empty(2, device="meta"),
            r"bin: x is no dense tensor: .*_rebuild_meta_tensor",
        ),
        (lambda: B.numpy(), r"bin: x is no dense tensor: .*multiarray\._reconstruct"),
        (lambda: Averages(), r"bin: x is no dense tensor: .*\.Averages"),
        (lambda: {"b": B}, r"bin: x holds tensors and is none \(x\.b\)"),
        (lambda: [B], r"bin: x holds tensors and is none \(x\.0\)"),
        (lambda: {"c": [{"b": B}]}, r"bin: x holds tensors and is none \(x\.c\.0\.b\)"),
    ],
    ids=["sparse", "quantized", "meta", "numpy", "object", "dict", "list", "deeper"],
)
def test_what_is_no_plain_tensor_is_told_of(
    make: Callable[[], Any], message: str, tmp_path: Path
) -> None:
    source = saved(tmp_path / "in", {"a": A, "x": make()})
    with pytest.raises(CheckpointError, match=message):
        consolidate(source, tmp_path / "out", remove_source=True)
    assert (source / "pytorch_model.bin").exists()
    with pytest.raises(CheckpointError, match=message):
        read_foreign(source)


@pytest.mark.parametrize(
    "value",
    [None, 7, "text", torch.float32, torch.device("cpu"), [1, {"b": 2}], Hostile(Path("none"))],
)
def test_what_holds_no_elements_may_lie_beside_tensors(value: Any, tmp_path: Path) -> None:
    consolidate(saved(tmp_path / "in", {"a": A, "x": value}), tmp_path / "out")
    assert written(tmp_path / "out") == {"a": A.tolist()}


def test_lists_that_hold_each_other_have_an_end(tmp_path: Path) -> None:
    endless: list[Any] = [1]
    endless.append(endless)
    for _ in range(50):
        endless = [endless, endless]
    consolidate(saved(tmp_path / "in", {"a": A, "x": endless}), tmp_path / "out")
    assert written(tmp_path / "out") == {"a": A.tolist()}


def with_state(**others: Any) -> dict[str, Any]:
    """A model beside an optimizer's state and a random state."""
    parameter = nn.Parameter(A.clone())
    optimizer = torch.optim.AdamW([parameter])
    (parameter * 2).sum().backward()
    optimizer.step()
    state = optimizer.state_dict()
    random = torch.get_rng_state()
    return {
        "model": {"a": A},
        "optimizer": state,
        "second": state,
        "rng_state": random,
        "cuda_rng": [random],
        "step": torch.tensor(5),
        "loss": torch.tensor(0.5),
        **others,
    }


def test_a_models_averages_are_a_set_of_their_own(tmp_path: Path) -> None:
    source = saved(tmp_path / "in", with_state(ema={"module": {"a": B}, "decay": 0.9}))
    with pytest.raises(ConfigError, match=r"several sets of weights \(model, ema\)"):
        consolidate(source, tmp_path / "out", remove_source=True)
    consolidate(source, tmp_path / "out")
    assert written(tmp_path / "out") == {"a": A.tolist()}
    consolidate(source, tmp_path / "averages", weights="ema", verify=True)
    assert written(tmp_path / "averages") == {"a": B.tolist()}
    with pytest.raises(CheckpointError, match="no weights named 'emma'; it has: model, ema"):
        consolidate(source, tmp_path / "none", weights="emma")


@pytest.mark.parametrize("averages", [[A, B], Averages(), B, {"shadow_params": [A, B]}])
def test_averages_without_names_are_not_removed_nor_taken(averages: Any, tmp_path: Path) -> None:
    source = saved(tmp_path / "in", with_state(ema=averages))
    with pytest.raises(ConfigError, match=r"several sets of weights \(model, ema\)"):
        consolidate(source, tmp_path / "out", remove_source=True)
    with pytest.raises(CheckpointError, match=r"ema.*(holds no tensors by name|and is none)"):
        consolidate(source, tmp_path / "out", weights="ema")
    consolidate(source, tmp_path / "out")
    assert written(tmp_path / "out") == {"a": A.tolist()}


def test_the_state_of_training_is_no_set_of_weights(tmp_path: Path) -> None:
    source = saved(tmp_path / "in", with_state())
    assert consolidate(source, tmp_path / "out", remove_source=True).source_removed
    assert written(tmp_path / "out") == {"a": A.tolist()}


def test_two_models_of_one_name_are_refused(tmp_path: Path) -> None:
    source = saved(tmp_path / "in", {"state_dict": {"a": A}, "model": {"a": B}})
    with pytest.raises(CheckpointError, match="holds two sets of weights, and both are its model"):
        consolidate(source, tmp_path / "out")


def test_names_that_are_no_text_are_refused(tmp_path: Path) -> None:
    source = saved(tmp_path / "in", {0: A, "b": B})
    with pytest.raises(CheckpointError, match=r"bin: 0 can't be a tensor's name: it is no text"):
        consolidate(source, tmp_path / "out")


def test_numbers_of_the_other_byte_order_are_refused(tmp_path: Path) -> None:
    source = saved(tmp_path / "in", {"a": A})
    path = source / "pytorch_model.bin"
    with zipfile.ZipFile(path) as zipped:
        records = {info.filename: zipped.read(info) for info in zipped.infolist()}
    with zipfile.ZipFile(path, "w") as zipped:
        for name, content in records.items():
            big = A.numpy().astype(">f4").tobytes() if "/data/" in name else content
            zipped.writestr(name, b"big" if name.endswith("byteorder") else big)
    assert torch.load(path)["a"].equal(A)
    with pytest.raises(CheckpointError, match=r"bin: its numbers have the byte order 'big'"):
        consolidate(source, tmp_path / "out")


@pytest.mark.parametrize("how", ["conj", "neg"])
def test_elements_that_are_to_be_changed_on_reading_are_refused(how: str, tmp_path: Path) -> None:
    conjugated = torch.tensor([1 + 2j, 3 + 4j]).conj()
    source = saved(tmp_path / "in", {"z": conjugated if how == "conj" else conjugated.imag})
    with pytest.raises(CheckpointError, match=rf"bin: .*marked .'{how}'.*resolve_{how}\(\)"):
        consolidate(source, tmp_path / "out")


def test_a_tensor_under_the_headers_own_name_is_for_torch_alone(tmp_path: Path) -> None:
    source = saved(tmp_path / "in", {"__metadata__": A, "b": B})
    with pytest.raises(CheckpointError, match=r"__metadata__, .* use --format torch"):
        consolidate(source, tmp_path / "out")
    consolidate(source, tmp_path / "out", format="torch")
    read = torch.load(tmp_path / "out" / "pytorch_model.bin")
    assert read["__metadata__"].equal(A) and read["b"].equal(B)


def test_the_format_before_the_zip_is_called_by_its_name(tmp_path: Path) -> None:
    source = saved(tmp_path / "in", {"a": A}, _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match=r"bin: is in torch's old format.* save it again"):
        consolidate(source, tmp_path / "out")
