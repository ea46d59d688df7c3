"""Other tools' files, against those tools as oracles."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor

from bigtrain.checkpoint.blocks import FilePool
from bigtrain.checkpoint.dtypes import DTYPES
from bigtrain.checkpoint.foreign import read_foreign
from bigtrain.checkpoint.formats.dcp import read_dcp
from bigtrain.checkpoint.formats.safetensors import header_bytes, read_safetensors
from bigtrain.checkpoint.formats.transformers_dir import read_optimizer
from bigtrain.checkpoint.index import TensorIndex
from bigtrain.checkpoint.load import IndexedSource
from bigtrain.checkpoint.records import read_dcp_items
from bigtrain.errors import CheckpointError
from bigtrain.topology import RankInfo
from tests.checkpoint.stand_in import make_state, run_ranks
from tests.checkpoint.test_torch_file import Hostile


def read(index: TensorIndex, name: str, kind: str = "weight") -> torch.Tensor:
    """The whole tensor, in three reads."""
    entry = index.entry(name, kind)
    whole = torch.empty(entry.numel, dtype=getattr(torch, entry.dtype.name))
    with contextlib.closing(FilePool()) as pool:
        source = IndexedSource(index, pool)
        for begin in range(0, entry.numel, max(1, entry.numel // 3)):
            piece = whole[begin : begin + max(1, entry.numel // 3)]
            source.read_into(name, kind, begin, piece)
    return whole.reshape(entry.shape)


def test_safetensors_of_every_type_are_read_as_they_were_written(tmp_path: Path) -> None:
    tensors = {
        name: torch.randint(0, 2, (3, 5)).to(getattr(torch, name))
        for name, dtype in DTYPES.items()
        if dtype.safetensors
    }
    tensors |= {"scalar": torch.tensor(2.5), "empty": torch.empty(0, 3)}
    save_file(tensors, tmp_path / "x.safetensors")
    index = read_safetensors([tmp_path / "x.safetensors"])
    index.check_tiling()
    for name, tensor in tensors.items():
        found = read(index, name)
        assert found.shape == tensor.shape and found.dtype == tensor.dtype
        assert torch.equal(
            found.reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8)
        )


def test_safetensors_reads_our_header(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    data = torch.arange(12.0)
    header = header_bytes([("a", DTYPES["float32"], (3, 4)), ("b", DTYPES["float32"], ())])
    assert len(header) % 8 == 0
    (tmp_path / "x").write_bytes(header + bytes(data.view(torch.uint8).tolist()) + bytes(4))
    loaded = load_file(tmp_path / "x")
    assert torch.equal(loaded["a"], data.reshape(3, 4)) and loaded["b"] == 0


@pytest.mark.parametrize(
    "data",
    [b"", b"\x10", b"\xff" * 8 + b"{}", b"\x02\0\0\0\0\0\0\0{", b"\x02\0\0\0\0\0\0\0[]"],
)
def test_a_damaged_safetensors_file_is_named(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "x").write_bytes(data)
    with pytest.raises(CheckpointError, match="x: not a safetensors file"):
        read_safetensors([tmp_path / "x"])


def test_a_safetensors_file_that_is_cut_off_is_refused(tmp_path: Path) -> None:
    save_file({"a": torch.ones(100)}, tmp_path / "x")
    (tmp_path / "x").write_bytes((tmp_path / "x").read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="x: a would lie at bytes 0 to 400 of 399"):
        read_safetensors([tmp_path / "x"])


@pytest.mark.parametrize(
    ("first", "second"),
    [
        pytest.param([0, 8], [4, 12], id="overlapping"),
        pytest.param([0, 8], [0, 8], id="the same bytes"),
        pytest.param([0, 8], [16, 24], id="a gap"),
        pytest.param([8, 16], [16, 24], id="a gap before them"),
        pytest.param([0, 8], [8, 16], id="bytes behind them"),
    ],
)
def test_tensors_that_do_not_lie_one_behind_the_other_are_refused_as_by_safetensors(
    first: list[int], second: list[int], tmp_path: Path
) -> None:
    places = {"a": first, "b": second}
    header = json.dumps(
        {n: {"dtype": "F32", "shape": [2], "data_offsets": at} for n, at in places.items()}
    ).encode()
    (tmp_path / "x").write_bytes(len(header).to_bytes(8, "little") + header + bytes(24))
    with pytest.raises(SafetensorError):
        load_file(tmp_path / "x")
    with pytest.raises(CheckpointError, match="x: the tensors before .* end at byte"):
        read_safetensors([tmp_path / "x"])


def test_a_transformers_directory_with_shards_and_a_named_optimizer_is_read(tmp_path: Path) -> None:
    model, optimizer = make_state()
    names = {p: name for name, p in model.named_parameters()}
    weights = {name: p.detach() for name, p in model.named_parameters()}
    first, second = dict(list(weights.items())[:3]), dict(list(weights.items())[3:])
    save_file(first, tmp_path / "model-00001-of-00002.safetensors")
    save_file(second, tmp_path / "model-00002-of-00002.safetensors")
    weight_map = dict.fromkeys(first, "model-00001-of-00002.safetensors")
    weight_map |= dict.fromkeys(second, "model-00002-of-00002.safetensors")
    index_file = tmp_path / "model.safetensors.index.json"
    index_file.write_text(json.dumps({"weight_map": weight_map}))
    saved = optimizer.state_dict()
    for group, live in zip(saved["param_groups"], optimizer.param_groups, strict=True):
        group["param_names"] = [names[p] for p in live["params"]]
    torch.save(saved, tmp_path / "optimizer.pt")
    index = read_foreign(tmp_path).index
    index.check_tiling()
    for parameter, name in names.items():
        assert torch.equal(read(index, name), parameter)
        for kind, value in optimizer.state.get(parameter, {}).items():
            assert torch.equal(read(index, name, kind), value)
    assert index.param_groups is not None
    assert [group["weight_decay"] for group in index.param_groups] == [0.1, 0.0]

    index_file.write_text(json.dumps({"weight_map": {"a": "../outside"}}))
    with pytest.raises(CheckpointError, match=r"outside of its directory: \['\.\./outside'\]"):
        read_foreign(tmp_path)


def test_an_optimizers_state_in_any_order_is_read_in_its_own(tmp_path: Path) -> None:
    torch.manual_seed(0)
    moments = {
        "exp_avg": torch.randn(4, 5, 3, 3).to(memory_format=torch.channels_last),
        "exp_avg_sq": torch.randn(3, 3, 4, 5).permute(2, 3, 1, 0),
    }
    group = {"params": [0], "param_names": ["conv"], "lr": 0.1}
    saved = {"state": {0: moments}, "param_groups": [group]}
    torch.save(saved, tmp_path / "optimizer.pt")
    index = read_optimizer(tmp_path / "optimizer.pt")
    index.check_tiling()
    for kind, value in moments.items():
        assert torch.equal(read(index, "conv", kind), value)


def test_an_optimizer_that_numbers_its_parameters_is_refused(tmp_path: Path) -> None:
    torch.save(make_state()[1].state_dict(), tmp_path / "optimizer.pt")
    with pytest.raises(CheckpointError, match="numbers its parameters and does not name them"):
        read_optimizer(tmp_path / "optimizer.pt")


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(6, 9)
        self.second = nn.Linear(9, 5, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x).relu())


def save_fsdp(world: RankInfo, directory: Path) -> dict[str, Any]:
    """Save a trained FSDP2 model as torch does; what is in it, whole."""
    mesh = init_device_mesh("cpu", (world.world_size,))
    model = Layers()
    for layer in (model.first, model.second, model):
        fully_shard(layer, mesh=mesh)
    optimizer = torch.optim.AdamW(
        [
            {"params": [model.first.weight, model.second.weight], "weight_decay": 0.1},
            {"params": [model.first.bias], "weight_decay": 0.0},
        ]
    )
    model(torch.ones(2, 6)).sum().backward()
    optimizer.step()
    model_state, optimizer_state = get_state_dict(model, optimizer)
    state = {"model": model_state, "optim": optimizer_state}
    dcp.save(state, checkpoint_id=str(directory))
    whole: dict[str, Any] = {}
    for name, value in model_state.items():
        whole[f"{name}|weight"] = value.full_tensor()
    for name, values in optimizer_state["state"].items():
        for kind, value in values.items():
            whole[f"{name}|{kind}"] = value.full_tensor() if kind != "step" else value
    return whole


def test_what_fsdp_saved_through_torch_is_read(tmp_path: Path) -> None:
    whole = run_ranks(2, save_fsdp, tmp_path / "dcp")[0]
    index = read_dcp(tmp_path / "dcp")
    index.check_tiling()
    assert {f"{name}|{kind}" for name, kind in index.entries} == whole.keys()
    for key, value in whole.items():
        assert torch.equal(read(index, *key.split("|")), value), key
    assert index.param_groups is not None
    assert [sorted(group["params"]) for group in index.param_groups] == [
        ["first.weight", "second.weight"],
        ["first.bias"],
    ]
    assert [group["weight_decay"] for group in index.param_groups] == [0.1, 0.0]


def save_columns(world: RankInfo, directory: Path) -> None:
    mesh = init_device_mesh("cpu", (world.world_size,))
    base = torch.arange(3 * 10 * 4.0).reshape(3, 10, 4)
    state = {
        "columns": distribute_tensor(base, mesh, [Shard(1)]),
        "inner": distribute_tensor(base, mesh, [Shard(2)]),
        "plain": torch.arange(5),
        "text": "hello",
    }
    dcp.save(state, checkpoint_id=str(directory))


def test_shards_along_any_dim_are_read(tmp_path: Path) -> None:
    run_ranks(3, save_columns, tmp_path / "dcp")
    index = read_dcp(tmp_path / "dcp")
    index.check_tiling()
    base = torch.arange(3 * 10 * 4.0).reshape(3, 10, 4)
    assert torch.equal(read(index, "columns"), base)
    assert torch.equal(read(index, "inner"), base)
    assert torch.equal(read(index, "plain"), torch.arange(5))
    with contextlib.closing(FilePool()) as pool:
        source = IndexedSource(index, pool)
        for start in range(0, base.numel(), 7):
            out = torch.empty(min(11, base.numel() - start))
            source.read_into("columns", "weight", start, out)
            assert torch.equal(out, base.reshape(-1)[start : start + 11])


def test_a_shard_that_is_missing_is_a_gap_before_anything_is_used(tmp_path: Path) -> None:
    import pickle

    run_ranks(3, save_columns, tmp_path / "dcp")
    path = tmp_path / "dcp" / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    del metadata.state_dict_metadata["columns"].chunks[1]
    path.write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointError, match="weight of columns: elements 16 to 32 are missing"):
        read_dcp(tmp_path / "dcp").check_tiling()


def test_hostile_metadata_does_nothing_and_is_refused(tmp_path: Path) -> None:
    import pickle

    touched = tmp_path / "touched"
    (tmp_path / ".metadata").write_bytes(pickle.dumps(Hostile(touched)))
    with pytest.raises(CheckpointError, match="not the metadata of a DCP checkpoint"):
        read_dcp(tmp_path)
    (tmp_path / ".metadata").write_bytes(b"\x80\x04.")
    with pytest.raises(CheckpointError, match="its structure can't be read"):
        read_dcp(tmp_path)
    assert not touched.exists()


OUTSIDE = "names the file .*, outside of itself"
NO_METADATA = r"\.metadata: not the metadata of a DCP checkpoint"


@pytest.mark.parametrize(
    ("field", "value", "told"),
    [
        ("relative_path", "/etc/passwd", OUTSIDE),
        ("relative_path", "../outside", OUTSIDE),
        ("relative_path", ".", OUTSIDE),
        ("relative_path", "a\0b", OUTSIDE),
        ("relative_path", "x" * 5000, "too long"),
        ("relative_path", 5, NO_METADATA),
        ("offset", -5, NO_METADATA),
        ("offset", 1.5, NO_METADATA),
        ("offset", 1 << 70, NO_METADATA),
        ("length", "a", NO_METADATA),
    ],
)
@pytest.mark.parametrize("read_it", [read_dcp, read_dcp_items], ids=["index", "items"])
def test_metadata_that_says_what_no_writer_says_is_refused_in_few_words(
    tmp_path: Path, field: str, value: Any, told: str, read_it: Callable[[Path], Any]
) -> None:
    import pickle

    directory = tmp_path / "dcp"
    dcp.save({"model.a": torch.ones(4, 4)}, checkpoint_id=directory, no_dist=True)
    metadata = pickle.loads((directory / ".metadata").read_bytes())
    for stored in metadata.storage_data.values():
        setattr(stored, field, value)
    (directory / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointError, match=told) as refusal:
        read_it(directory)
    assert len(str(refusal.value)) < 500
