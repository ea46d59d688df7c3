"""What unmodified scripts with transformers' Trainer saved is gone on from by `--resume`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

_SCRIPT = Path(__file__).parent.parent / "scripts" / "go_on.py"
_SHARDED = ("--env", "FSDP_STATE_DICT_TYPE=SHARDED_STATE_DICT")
WRITERS: dict[str, tuple[str, int, tuple[str, ...]]] = {
    "plain": ("single", 1, ()),
    "DDP": ("ddp", 2, ()),
    "FSDP, full": ("fsdp", 2, ()),
    "FSDP, sharded": ("fsdp", 2, _SHARDED),
    "DeepSpeed ZeRO-2": ("zero2", 2, ()),
    "DeepSpeed ZeRO-3": ("zero3", 2, ()),
}
READERS = (("single", 1), ("ddp", 3), ("fsdp", 2), ("zero3", 2))


def launch(folder: Path, library: str, engine: str, ranks: int, *more: str) -> list[float]:
    """The loss of each of six steps of twelve sequences."""
    command = [sys.executable, "-m", "bigtrain", "launch", str(_SCRIPT), "--engine", engine]
    command += ["--procs-per-node", str(ranks), "--output-dir", str(folder / f"{library} logs")]
    done = subprocess.run(
        [*command, *more, "--", str(folder), library, "6", str(ranks)],
        capture_output=True,
        text=True,
        env=dict(os.environ),
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    losses: list[float] = json.loads((folder / f"{library}.json").read_text())
    assert len(losses) == 6
    return losses


def go_on_everywhere(folder: Path, name: str, readers: tuple[tuple[str, int], ...]) -> None:
    engine, ranks, more = WRITERS[name]
    whole = launch(folder, "transformers", engine, ranks, *more)
    checkpoint = folder / "transformers" / "checkpoint-3"
    # As it is after three steps: without this one it could not have been gone on from.
    assert json.loads((checkpoint / "trainer_state.json").read_text())["global_step"] == 3
    for reader, size in readers:
        rest = launch(folder, "bigtrain", reader, size, "--resume", str(checkpoint))
        assert rest[:3] == whole[:3]
        assert rest[3] == pytest.approx(whole[3], rel=1e-6), (name, reader)
        assert rest == pytest.approx(whole, rel=1e-5), (name, reader)


def test_a_run_of_transformers_with_deepspeed_goes_on_under_fsdp(tmp_path: Path) -> None:
    go_on_everywhere(tmp_path, "DeepSpeed ZeRO-2", (("fsdp", 2),))


@pytest.mark.slow
@pytest.mark.parametrize("name", WRITERS)
def test_a_run_of_transformers_goes_on_under_every_engine(tmp_path: Path, name: str) -> None:
    go_on_everywhere(tmp_path, name, READERS)
