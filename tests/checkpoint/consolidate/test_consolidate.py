"""Own checkpoints, choices, interruptions: what goes in comes out, or it is said why not."""

from __future__ import annotations

import filecmp
import json
import os
import random
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file

from bigtrain.checkpoint.consolidate import Moved, consolidate
from bigtrain.checkpoint.consolidate.journal import Staging
from bigtrain.checkpoint.source import open_source
from bigtrain.errors import CheckpointError, ConfigError
from bigtrain.topology import RankInfo
from tests.checkpoint.stand_in import StandIn, make_state, run_ranks, save


def save_on(world: RankInfo, target: Path) -> None:
    save(target, StandIn(*make_state(), world=world, is_sharded=True))


def plain(path: Path, tensors: dict[str, torch.Tensor]) -> Path:
    path.mkdir(parents=True)
    save_file(tensors, path / "model.safetensors")
    return path


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_own_sharded_checkpoints_hold_the_models_weights(world_size: int, tmp_path: Path) -> None:
    run_ranks(world_size, save_on, tmp_path / "checkpoint-3")

    summary = consolidate(tmp_path, tmp_path / "out", verify=True)

    model, _ = make_state()
    expected = {name: p.detach() for name, p in model.named_parameters()}
    expected |= {name: b for name, b in model.named_buffers() if name in model.state_dict()}
    ours = load_file(tmp_path / "out" / "model.safetensors")
    assert ours.keys() == expected.keys()
    assert all(torch.equal(ours[name], value) for name, value in expected.items())
    assert summary.step == 3
    assert summary.source_checked == "all hashes of the manifest hold"


def test_own_whole_checkpoints_are_read_too(tmp_path: Path) -> None:
    engine = StandIn(*make_state(), world=RankInfo(), is_sharded=False)
    save(tmp_path / "checkpoint-3", engine)
    summary = consolidate(tmp_path / "checkpoint-3", tmp_path / "out")
    assert "xxh3 of all" in summary.source_checked
    assert torch.equal(
        load_file(tmp_path / "out" / "model.safetensors")["embedding.weight"],
        engine.model.state_dict()["embedding.weight"],
    )


def test_a_flipped_bit_in_an_own_checkpoint_is_found_while_copying(tmp_path: Path) -> None:
    source = tmp_path / "checkpoint-3"
    run_ranks(2, save_on, source)
    extent = open_source(source).index.entry("convolution.weight", "weight").extents[0]
    broken = open_source(source).index.files[extent.file]
    with broken.open("r+b") as file:
        file.seek(extent.offset)
        byte = file.read(1)[0]
        file.seek(extent.offset)
        file.write(bytes([byte ^ 16]))

    with pytest.raises(CheckpointError, match=broken.name):
        consolidate(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_newest_that_holds_is_taken_and_a_step_can_be_chosen(tmp_path: Path) -> None:
    for step in (9, 10):
        dcp.save(
            {"model": {"weight": torch.full((3,), float(step))}},
            checkpoint_id=str(tmp_path / "run" / f"step-{step}"),
            no_dist=True,
        )

    def taken(output: str, **choice: int) -> float:
        consolidate(tmp_path / "run", tmp_path / output, **choice)  # type: ignore[arg-type]
        return load_file(tmp_path / output / "model.safetensors")["weight"][0].item()

    assert taken("newest") == 10
    assert taken("chosen", step=9) == 9
    next((tmp_path / "run" / "step-10").glob("*.distcp")).unlink()
    assert taken("holds") == 9
    with pytest.raises(CheckpointError, match="no checkpoint of step 4; it has 9, 10"):
        taken("none", step=4)


def test_averaged_weights_are_a_set_of_their_own(tmp_path: Path) -> None:
    state = {"model": {"weight": torch.zeros(3)}, "ema": {"weight": torch.ones(3)}}
    dcp.save(state, checkpoint_id=str(tmp_path / "dcp"), no_dist=True)

    consolidate(tmp_path / "dcp", tmp_path / "out", weights="ema")

    assert load_file(tmp_path / "out" / "model.safetensors")["weight"].tolist() == [1, 1, 1]
    with pytest.raises(CheckpointError, match="no weights named 'x'; it has: model, ema"):
        consolidate(tmp_path / "dcp", tmp_path / "other", weights="x")


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("stored", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_casts_equal_torchs(dtype: str, stored: torch.dtype, tmp_path: Path) -> None:
    torch.manual_seed(0)
    edge = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 65504, 65519, 65520, 1e-8])
    values = torch.cat([edge, torch.randn(300_000) * 100, torch.tensor([3.4e38, 1e-40])])
    source = plain(tmp_path / "in", {"w": values.to(stored), "i": torch.arange(3)})
    target = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[dtype]

    summary = consolidate(source, tmp_path / "out", dtype=dtype)

    ours = load_file(tmp_path / "out" / "model.safetensors")
    expected = values.to(stored).to(target)
    assert ours["i"].dtype == torch.int64
    assert torch.equal(ours["w"].nan_to_num(7.0), expected.nan_to_num(7.0))
    assert torch.equal(ours["w"].isnan(), expected.isnan())
    became = (expected.isinf() & ~values.to(stored).isinf()).sum().item()
    assert sum(summary.overflowed.values()) == became
    assert bool(summary.warnings[1:]) == bool(became)


def test_a_config_names_the_precision_that_the_weights_have(tmp_path: Path) -> None:
    source = plain(tmp_path / "in", {"w": torch.randn(3)})
    config = {"dtype": "bfloat16", "vision_config": {"torch_dtype": "bfloat16"}, "x": "bfloat16"}
    (source / "config.json").write_text(json.dumps(config))
    (source / "tokenizer.json").write_text("{}")
    (source / "optimizer.pt").write_text("not for a model")

    consolidate(source, tmp_path / "out", dtype="fp16")

    written = json.loads((tmp_path / "out" / "config.json").read_text())
    nested = {"torch_dtype": "float16"}
    assert written == {"dtype": "float16", "vision_config": nested, "x": "bfloat16"}
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"config.json", "tokenizer.json", "model.safetensors"}


def test_an_adapter_is_written_as_one(tmp_path: Path) -> None:
    layer = "base_model.model.model.layers.0.q_proj"
    names = [f"{layer}.lora_A.default.weight", f"{layer}.lora_B.default.weight"]
    weights = {name: torch.randn(2, 2) for name in [*names, f"{layer}.base_layer.weight"]}
    source = plain(tmp_path / "in", weights)
    (source / "adapter_config.json").write_text("{}")

    consolidate(source, tmp_path / "out")

    written = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert sorted(written) == [f"{layer}.lora_A.weight", f"{layer}.lora_B.weight"]
    assert (tmp_path / "out" / "adapter_config.json").exists()


def test_progress_ends_at_the_whole(tmp_path: Path) -> None:
    source = plain(tmp_path / "in", {str(i): torch.randn(1000) for i in range(9)})
    seen: list[Moved] = []
    summary = consolidate(
        source, tmp_path / "out", max_shard_size="9KB", jobs=2, progress=seen.append
    )
    assert len(summary.files) == 5
    assert seen[-1].done_bytes >= sum(torch.randn(1000).nbytes for _ in range(9))
    assert json.dumps(summary.to_json())
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 36000
    assert index["weight_map"]["0"] == "model-00001-of-00005.safetensors"


def test_an_output_that_is_there_is_never_touched(tmp_path: Path) -> None:
    source = plain(tmp_path / "in", {"w": torch.randn(3)})
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("keep")
    with pytest.raises(CheckpointError, match="is there already"):
        consolidate(source, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]


def test_two_can_not_write_the_same_output(tmp_path: Path) -> None:
    source = plain(tmp_path / "in", {"w": torch.randn(3)})
    other = Staging(tmp_path / "out", fingerprint="x", resume=False)
    with pytest.raises(CheckpointError, match="being written by another process"):
        consolidate(source, tmp_path / "out")
    other.close()


def test_a_disk_that_is_too_small_is_said_before_the_first_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bigtrain.checkpoint.consolidate import journal

    source = plain(tmp_path / "in", {"w": torch.randn(3000)})
    monkeypatch.setattr(journal, "free_bytes", lambda _path: 1000)
    with pytest.raises(CheckpointError, match="no space for .*out: it takes 12,"):
        consolidate(source, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "int8"}, "dtype is 'int8'; it must be keep, fp32, bf16 or fp16"),
        ({"max_shard_size": "big"}, "max_shard_size is 'big'; write it as 5GB"),
        ({"jobs": 0}, "jobs is 0; it must be at least 1"),
    ],
)
def test_wrong_choices_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        consolidate("nowhere", "out", **options)  # type: ignore[arg-type]


def test_a_directory_without_a_checkpoint_says_what_is_in_it(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(CheckpointError, match=r"holds no checkpoint .*in it: notes\.txt"):
        consolidate(tmp_path, tmp_path / "out")


MEGABYTE = 1 << 20
TENSORS = 40
SCRIPT = """
import os, sys, time
from bigtrain.checkpoint.consolidate import consolidate
slow = float(sys.argv[3])
if slow:
    import bigtrain.checkpoint.consolidate.sink as sink
    sink._SYNC_BYTES = 4 << 20
written, real = [], os.pwrite
def pwrite(fd, data, offset):
    if slow:
        time.sleep(slow)
    written.append(len(data))
    return real(fd, data, offset)
os.pwrite = pwrite
summary = consolidate(sys.argv[1], sys.argv[2], format=sys.argv[4], resume=True)
assert not {"torch", "numpy", "transformers", "deepspeed"} & sys.modules.keys()
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(peak.split()[1], sum(written))
"""


def large_source(path: Path) -> Path:
    """Tensors of 4 MiB, without torch's memory."""
    path.mkdir()
    spans = [(4 * MEGABYTE * i, 4 * MEGABYTE * (i + 1)) for i in range(TENSORS)]
    header = {
        f"t{i}": {"dtype": "I32", "shape": [MEGABYTE], "data_offsets": span}
        for i, span in enumerate(spans)
    }
    text = json.dumps(header).encode()
    with (path / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for _ in range(TENSORS):
            file.write(os.urandom(4 * MEGABYTE))
    return path


def start(
    source: Path, output: Path, *, slow: float, form: str = "safetensors"
) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", SCRIPT, str(source), str(output), str(slow), form]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def read_output(output: Path) -> dict[str, torch.Tensor]:
    torch_file = output / "pytorch_model.bin"
    return torch.load(torch_file) if torch_file.exists() else load_file(next(output.iterdir()))


@pytest.mark.parametrize("form", ["safetensors", "torch"])
def test_killed_it_goes_on_where_it_was(form: str, tmp_path: Path) -> None:
    source, output = large_source(tmp_path / "in"), tmp_path / "out"
    journal = tmp_path / "out.partial" / "journal.jsonl"
    running = start(source, output, slow=0.02, form=form)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and (
        not journal.exists() or len(journal.read_text().splitlines()) < 6
    ):
        time.sleep(0.01)
    running.send_signal(signal.SIGKILL)
    running.wait()
    if running.stdout:
        running.stdout.close()
    entered = len(journal.read_text().splitlines()) - 1
    partial = next((tmp_path / "out.partial").glob("*model*")).read_bytes()
    assert not output.exists()
    assert partial[:8] == bytes(8), "its header was there before its tensors"
    assert entered < TENSORS

    again = start(source, output, slow=0, form=form)
    said, _ = again.communicate(timeout=60)

    assert again.returncode == 0
    peak_kb, written = map(int, said.split())
    assert peak_kb < 100_000
    assert written < (TENSORS - entered) * 4 * MEGABYTE + 100_000, "finished ones were copied again"
    ours = read_output(output)
    theirs = load_file(source / "model.safetensors")
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())
    assert len(list(output.iterdir())) == 1


@pytest.mark.slow
@pytest.mark.parametrize("form", ["safetensors", "torch"])
def test_killed_anywhere_again_and_again_it_ends_with_the_right_bytes(
    form: str, tmp_path: Path
) -> None:
    source, output = large_source(tmp_path / "in"), tmp_path / "out"
    consolidate(source, tmp_path / "expected", format=form)
    chance = random.Random(form)
    for kill in range(12):
        target = (kill * TENSORS // 13 + chance.uniform(0, 3)) * 4 * MEGABYTE
        running = start(source, output, slow=0.002, form=form)
        while running.poll() is None and allocated(tmp_path / "out.partial") < target:
            time.sleep(0.002)
        assert running.poll() is None, f"it ended before its kill {kill}"
        running.kill()
        running.communicate()
    start(source, output, slow=0, form=form).communicate(timeout=60)
    name = next((tmp_path / "expected").iterdir()).name
    assert filecmp.cmp(output / name, tmp_path / "expected" / name, shallow=False)


def allocated(partial: Path) -> int:
    """Bytes that the disk holds of the weights."""
    return sum(path.stat().st_blocks * 512 for path in partial.glob("*model*"))


def test_what_was_spoiled_in_between_is_written_anew(tmp_path: Path) -> None:
    source, output = large_source(tmp_path / "in"), tmp_path / "out"
    running = start(source, output, slow=0.02)
    journal = tmp_path / "out.partial" / "journal.jsonl"
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and (
        not journal.exists() or len(journal.read_text().splitlines()) < 6
    ):
        time.sleep(0.01)
    running.kill()
    running.communicate()
    with (tmp_path / "out.partial" / "model.safetensors").open("r+b") as file:
        file.seek(5 * MEGABYTE)
        file.write(b"spoiled")

    consolidate(source, output, resume=True, verify=True)

    ours = load_file(output / "model.safetensors")
    theirs = load_file(source / "model.safetensors")
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())


def test_it_does_not_go_on_with_another_source(tmp_path: Path) -> None:
    source = plain(tmp_path / "in", {"w": torch.randn(3)})
    Staging(tmp_path / "out", fingerprint="another", resume=False).close()
    with pytest.raises(CheckpointError, match="begun from another source or with other options"):
        consolidate(source, tmp_path / "out", resume=True)
    consolidate(source, tmp_path / "out")
