"""`pytorch_model.bin`, written without torch: torch, transformers and zipfile all read it."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from bigtrain.checkpoint.consolidate import consolidate
from bigtrain.checkpoint.consolidate.frames import OutputTensor
from bigtrain.checkpoint.consolidate.torch_zip import TorchFrame
from bigtrain.checkpoint.dtypes import DTYPES
from bigtrain.checkpoint.index import Extents, TensorEntry
from bigtrain.checkpoint.torch_file import Archive
from bigtrain.errors import ConfigError


def every_type() -> dict[str, torch.Tensor]:
    state = {
        name: torch.arange(1, 8).to(getattr(torch, name))
        for name, dtype in DTYPES.items()
        if dtype.safetensors and not name.startswith("complex")
    }
    state |= {"bool": torch.tensor([True, False]), "scalar": torch.tensor(2.5)}
    state |= {"empty": torch.empty(0, 3), "größe": torch.randn(3, 5, 2), "large": torch.randn(300)}
    return state


def write(folder: Path, state: dict[str, torch.Tensor], **options: object) -> Path:
    (folder / "in").mkdir(parents=True)
    save_file(state, folder / "in" / "model.safetensors")
    consolidate(folder / "in", folder / "out", format="torch", verify=True, **options)  # type: ignore[arg-type]
    return folder / "out"


def assert_same(ours: dict[str, torch.Tensor], state: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == state.keys()
    for name, value in state.items():
        assert ours[name].dtype == value.dtype
        assert ours[name].shape == value.shape
        assert torch.equal(ours[name].view(-1).view(torch.uint8), value.view(-1).view(torch.uint8))


@pytest.mark.parametrize("mmap", [False, True])
def test_torch_reads_every_type_without_running_code(mmap: bool, tmp_path: Path) -> None:
    state = every_type()
    path = write(tmp_path, state) / "pytorch_model.bin"
    assert_same(torch.load(path, weights_only=True, mmap=mmap), state)


def test_its_checksums_hold_and_its_payloads_are_aligned(tmp_path: Path) -> None:
    path = write(tmp_path, every_type(), dtype="bf16") / "pytorch_model.bin"
    with zipfile.ZipFile(path) as zipped:
        assert zipped.testzip() is None
    places = Archive(path).checksums()
    assert len(places) == len(every_type())
    assert all(start % 64 == 0 for start, _, _ in places)


def test_it_is_cut_into_shards_with_an_index(tmp_path: Path) -> None:
    state = {f"t{i}": torch.randn(500) for i in range(5)}
    output = write(tmp_path, state, max_shard_size="4KB")
    names = sorted(path.name for path in output.glob("*.bin"))
    assert names == [f"pytorch_model-{i:05d}-of-00003.bin" for i in (1, 2, 3)]
    index = json.loads((output / "pytorch_model.bin.index.json").read_text())
    assert index["metadata"]["total_size"] == 10_000
    whole: dict[str, torch.Tensor] = {}
    for name in names:
        part = torch.load(output / name, weights_only=True)
        assert {index["weight_map"][key] for key in part} == {name}
        whole |= part
    assert_same(whole, state)


def test_what_it_wrote_is_a_source_again(tmp_path: Path) -> None:
    state = every_type()
    summary = consolidate(write(tmp_path, state), tmp_path / "again", format="torch")
    assert "CRC-32 of all" in summary.source_checked
    assert_same(torch.load(tmp_path / "again" / "pytorch_model.bin"), state)


def test_tensors_and_places_past_4_gib_are_read_too(tmp_path: Path) -> None:
    tensors = [
        OutputTensor(
            name=f"t{i}",
            entry=TensorEntry(
                name=f"t{i}",
                kind="weight",
                shape=(2_000_000_000,),
                dtype=DTYPES["float32"],
                extents=Extents([]),
            ),
            dtype=DTYPES["float32"],
        )
        for i in range(2)
    ]
    frame = TorchFrame(tensors)
    path = tmp_path / "large.bin"
    with path.open("wb") as file:  # with holes: 16 GB that take no space
        file.write(frame.header)
        for number, offset in enumerate(frame.offsets):
            file.seek(offset - len(frame.lead(number)))
            file.write(frame.lead(number))
            file.seek(offset + tensors[number].nbytes)
            file.write(frame.tail(number, 0))
        file.write(frame.trailer([0, 0]))
        assert file.tell() == frame.nbytes
    state = torch.load(path, weights_only=True, mmap=True)
    assert state["t1"].shape == (2_000_000_000,)
    with path.open("r+b") as file:
        file.seek(frame.offsets[1] + 4)
        file.write(torch.tensor(7.0).numpy().tobytes())
    assert torch.load(path, weights_only=True, mmap=True)["t1"][1] == 7


def test_an_unknown_format_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="format is 'gguf'; it must be safetensors or torch"):
        consolidate(tmp_path, tmp_path / "out", format="gguf")
