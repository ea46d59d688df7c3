"""Tensors that lie in another order than their own: right, in little memory, and checked."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from bigtrain.checkpoint import strided
from bigtrain.checkpoint.consolidate import consolidate, stream
from bigtrain.checkpoint.formats.torch_state_dict import read_state_dict
from bigtrain.errors import CheckpointError


def turned() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {
        "channels_last": torch.randn(5, 6, 3, 3).to(memory_format=torch.channels_last),
        "channels_last_3d": torch.randn(2, 3, 2, 4, 2).to(memory_format=torch.channels_last_3d),
        "transposed": torch.randn(17, 23).t(),
        "half": torch.randn(7, 5, 3).bfloat16().permute(2, 0, 1),
        "bytes": torch.arange(60, dtype=torch.uint8).reshape(3, 4, 5).permute(1, 2, 0),
        "sliced": torch.randn(9, 20, 8)[::2, 3:15:3, 1:6].permute(2, 0, 1),
        "columns": torch.randn(6, 10)[:, 2:5],
        "expanded": torch.randn(7, 1).expand(7, 4),
        "expanded_inside": torch.randn(3, 1, 4).expand(3, 5, 4),
        "windows": torch.randn(30).unfold(0, 6, 2),
        "scalar": torch.tensor(2.5),
        "empty": torch.empty(4, 0, 3).permute(2, 0, 1),
        "plain": torch.randn(4, 4),
    }


def saved(path: Path, tensors: dict[str, torch.Tensor]) -> Path:
    path.mkdir()
    torch.save(tensors, path / "pytorch_model.bin")
    return path


@pytest.mark.parametrize("dtype", ["keep", "bf16"])
@pytest.mark.parametrize("tile_bytes", [64, 16 << 20])
def test_tensors_in_any_order_are_written_in_their_own(
    tile_bytes: int, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "_STRIDED_BYTES", tile_bytes)
    monkeypatch.setattr(strided, "_BUFFER_BYTES", tile_bytes)
    monkeypatch.setattr(strided, "_GAP_BYTES", 16)
    tensors = turned()
    consolidate(saved(tmp_path / "in", tensors), tmp_path / "out", dtype=dtype, verify=True)
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        wanted = tensor.bfloat16() if dtype == "bf16" and tensor.is_floating_point() else tensor
        assert found[name].dtype == wanted.dtype and torch.equal(found[name], wanted), name


def test_a_tensor_in_another_order_is_one_piece(tmp_path: Path) -> None:
    path = saved(tmp_path / "in", turned()) / "pytorch_model.bin"
    index = read_state_dict([path])
    index.check_tiling()
    assert {len(entry.extents) for entry in index.entries.values()} == {0, 1}


def test_a_flipped_bit_in_a_transposed_tensor_is_found(tmp_path: Path) -> None:
    tensor = torch.randn(40, 30)
    source = saved(tmp_path / "in", {"before": torch.ones(3), "turned": tensor.t()})
    path = source / "pytorch_model.bin"
    content = bytearray(path.read_bytes())
    content[content.index(tensor.numpy().tobytes()) + 1000] ^= 4
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"(?s)checksum differs\); in them: turned"):
        consolidate(source, tmp_path / "out")


_MEASURED = """\
import sys
from bigtrain.checkpoint.consolidate import consolidate
consolidate(sys.argv[1], sys.argv[2], jobs=3, max_shard_size="60MB")
print(next(line for line in open('/proc/self/status') if line.startswith('VmHWM')))
"""


def test_orders_take_little_memory_however_large_the_tensors(tmp_path: Path) -> None:
    tensors = {
        "conv": torch.randn(640, 640, 3, 3).to(memory_format=torch.channels_last),
        "first": torch.randn(9000, 1500).t(),
        "second": torch.randn(9000, 1500).t(),
    }
    source = saved(tmp_path / "in", tensors)
    command = [sys.executable, "-c", _MEASURED, str(source), str(tmp_path / "out")]

    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)

    assert int(done.stdout.split()[1]) < 100_000  # KiB
    found: dict[str, torch.Tensor] = {}
    for path in (tmp_path / "out").glob("*.safetensors"):
        found |= load_file(path)
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
