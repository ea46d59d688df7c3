"""GPUs are counted from the device files, and only those that torch and the ranks will see."""

from __future__ import annotations

from pathlib import Path

import pytest

from bigtrain.planning import gpus


@pytest.mark.parametrize(
    ("visible", "count"),
    [
        (None, 4),
        ("", 0),
        ("-1", 0),
        ("0", 1),
        ("0,2", 2),
        ("0,-1,2", 1),
        ("GPU-8932f937-d72c,MIG-1/2/0", 2),
        ("0,1,2,3,4,5", 4),
    ],
)
def test_only_visible_devices_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, visible: str | None, count: int
) -> None:
    for name in ("nvidia0", "nvidia1", "nvidia2", "nvidia10", "nvidiactl", "nvidia-uvm"):
        (tmp_path / name).touch()
    monkeypatch.setattr(gpus, "_torch_has_cuda", lambda: True)
    environment = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}

    assert gpus.count_gpus(environment, devices=tmp_path) == count


def test_a_torch_without_cuda_has_no_gpus(tmp_path: Path) -> None:
    import torch

    (tmp_path / "nvidia0").touch()

    assert gpus.count_gpus({}, devices=tmp_path) == (0 if torch.version.cuda is None else 1)
