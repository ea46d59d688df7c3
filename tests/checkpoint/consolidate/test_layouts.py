"""The same checkpoint wherever a framework puts it, on a disk that only reads, or that fills up."""

from __future__ import annotations

import os
import resource
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file

from bigtrain.checkpoint.consolidate import consolidate

WORLD = 3
GIGABYTE = 10**9
READ_ONLY = """
import os, sys
from pathlib import Path

source = os.path.realpath(sys.argv[1])

def watch(event, arguments):
    writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (
        os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC)
    if writes or event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate",
                           "os.chmod", "os.utime", "os.link", "os.symlink"):
        for path in arguments[:2]:
            if isinstance(path, (str, os.PathLike)) and os.path.realpath(path).startswith(source):
                raise OSError(30, "Read-only file system", str(path))

sys.addaudithook(watch)
try:
    open(source + "/probe", "w")
    sys.exit("the source could be written to")
except OSError:
    pass
from bigtrain.checkpoint.consolidate import consolidate
consolidate(sys.argv[1], sys.argv[2], verify=True)
"""


def bare(inner: Path, target: Path) -> Path:
    shutil.copytree(inner, target / "global_step2")
    (target / "latest").write_text("global_step2")
    return target


def transformers(inner: Path, target: Path) -> Path:
    step = bare(inner, target / "checkpoint-2")
    (step / "config.json").write_text("{}")
    (step / "trainer_state.json").write_text('{"global_step": 2}')
    return target


def accelerate(inner: Path, target: Path) -> Path:
    shutil.copytree(inner, target / "pytorch_model")
    (target / "latest").write_text("pytorch_model")
    (target / "random_states_0.pkl").write_bytes(b"")
    return target


def lightning(inner: Path, target: Path) -> Path:
    checkpoint = target / "epoch=0-step=2.ckpt"
    shutil.copytree(inner, checkpoint / "checkpoint")
    (checkpoint / "latest").write_text("checkpoint")
    return checkpoint


@pytest.mark.parametrize("layout", [bare, transformers, accelerate, lightning])
@pytest.mark.parametrize("kind", ["zero2", "zero3"])
def test_a_zero_checkpoint_is_found_in_every_frameworks_directory(
    written: Callable[[int], Path],
    kind: str,
    layout: Callable[[Path, Path], Path],
    tmp_path: Path,
) -> None:
    original = written(WORLD) / f"{kind}-{WORLD}"
    source = layout(original / "global_step2", tmp_path / "in")

    summary = consolidate(source, tmp_path / "out")

    consolidate(original, tmp_path / "expected")
    ours = load_file(tmp_path / "out" / "model.safetensors")
    theirs = load_file(tmp_path / "expected" / "model.safetensors")
    assert summary.step == 2
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())


def test_accelerates_whole_fsdp_state_is_read(tmp_path: Path) -> None:
    state = {"a.weight": torch.randn(3, 5), "count": torch.tensor(7)}
    (tmp_path / "in").mkdir()
    torch.save(state, tmp_path / "in" / "pytorch_model_fsdp.bin")
    consolidate(tmp_path / "in", tmp_path / "out")
    ours = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(ours[name], value) for name, value in state.items())


@pytest.mark.parametrize("kind", ["zero2", "zero3", "dcp_both", "fsdp"])
def test_nothing_is_written_where_the_source_is(
    written: Callable[[int], Path], kind: str, tmp_path: Path
) -> None:
    source = written(WORLD) / f"{kind}-{WORLD}"
    command = [sys.executable, "-c", READ_ONLY, str(source), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "model.safetensors").exists()


def limit_files(nbytes: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, resource.RLIM_INFINITY))


def test_a_disk_that_fills_up_keeps_what_there_is_and_it_goes_on_from_there(
    tmp_path: Path,
) -> None:
    state = {f"t{i}": torch.randn(1 << 20) for i in range(8)}
    dcp.save(dict(state), checkpoint_id=str(tmp_path / "in"), no_dist=True)
    command = [sys.executable, "-m", "bigtrain", "consolidate", str(tmp_path / "in")]
    command.append(str(tmp_path / "out"))

    full = subprocess.run(
        command, capture_output=True, text=True, preexec_fn=lambda: limit_files(18 << 20)
    )

    assert full.returncode == 4
    assert f"error: {tmp_path / 'out.partial'}: File too large" in full.stderr
    assert "kept, to go on with (--resume)" in full.stderr
    assert not (tmp_path / "out").exists()
    entered = (tmp_path / "out.partial" / "journal.jsonl").read_text().count('"name"')
    assert 0 < entered < 8
    again = subprocess.run([*command, "--resume"], capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    ours = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(ours[name], value) for name, value in state.items())


def memory_group(limit: int) -> Path:
    """A memory cgroup of that size, version 1 or 2; skips where none can be made."""
    for parent, name in (
        (Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes"),
        (Path("/sys/fs/cgroup"), "memory.max"),
    ):
        group = parent / f"bigtrain-test-{os.getpid()}"
        try:
            group.mkdir()
            (group / name).write_text(str(limit))
        except OSError:
            continue
        return group
    pytest.skip("no memory cgroup can be made (it needs root)")


@pytest.mark.slow
@pytest.mark.parametrize("options", [[], ["--dtype", "bf16"], ["--format", "torch"]])
def test_4_gb_are_written_under_a_limit_of_512_mb(options: list[str], tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    count, numel = 16, GIGABYTE // 16
    header = {
        f"t{i}": f'{{"dtype":"F32","shape":[{numel}],"data_offsets":[{4 * numel * i},'
        f"{4 * numel * (i + 1)}]}}"
        for i in range(count)
    }
    text = ("{" + ",".join(f'"{name}":{value}' for name, value in header.items()) + "}").encode()
    with (tmp_path / "in" / "model.safetensors").open("wb") as file:  # of zeros, as holes
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + 4 * numel * count)
    group = memory_group(512 << 20)
    command = [sys.executable, "-m", "bigtrain", "consolidate", *options]
    try:
        done = subprocess.run(
            [*command, str(tmp_path / "in"), str(tmp_path / "out"), "--max-shard-size", "2GB"],
            capture_output=True,
            text=True,
            preexec_fn=lambda: (group / "cgroup.procs").write_text(str(os.getpid())),
        )
    finally:
        group.rmdir()
    assert done.returncode == 0, done.stderr
    width = 2 if "bf16" in options else 4
    files = [p for p in (tmp_path / "out").iterdir() if p.suffix in (".safetensors", ".bin")]
    assert sum(path.stat().st_size for path in files) > width * numel * count
    shutil.rmtree(tmp_path)
