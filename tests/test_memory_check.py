"""A run that can't fit is refused before it starts, with what would fit."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

from bigtrain.cluster_flags import ClusterFlags
from bigtrain.errors import ConfigError
from bigtrain.launch_command import Launch, _require_fit
from bigtrain.layers import parse_assignment
from bigtrain.planning import Request, device_memory

_RUN = """\
model:
  config: {model_type: llama, hidden_size: 1024, intermediate_size: 2816, num_hidden_layers: 16}
tokenizer: {kind: bytes}
data: {name: builtin:python-docs, sequence_length: 512}
training: {per_device_train_batch_size: 2}
cluster: {procs_per_node: 2}
"""


@pytest.fixture
def launch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Launch:
    (tmp_path / "run.yaml").write_text(_RUN)
    monkeypatch.setattr(device_memory, "_host_bytes", lambda: 8 << 30)
    return Launch(
        request=Request(target="run.yaml", overrides=(parse_assignment("engine=ddp"),)),
        where=ClusterFlags(),
        environment={"CUDA_VISIBLE_DEVICES": ""},
        working_dir=tmp_path,
    )


def test_a_run_that_can_not_fit_is_refused_with_the_engine_that_would(launch: Launch) -> None:
    with pytest.raises(ConfigError) as raised:
        _require_fit(launch.plan(), launch)

    message = str(raised.value)
    assert message.startswith("engine ddp needs ")
    assert "and there are 4.0 GiB (this machine's memory ÷ 2 processes)" in message
    assert "--engine auto would fit (fsdp, 2.6 GiB)" in message
    assert message.endswith("start it all the same with --no-memory-check")


def test_a_run_that_no_engine_can_fit_is_refused_and_one_that_is_told_to_starts(
    launch: Launch,
) -> None:
    said = parse_assignment("model.config.num_hidden_layers=400")
    request = dataclasses.replace(launch.request, overrides=(*launch.request.overrides, said))
    large = dataclasses.replace(launch, request=request)
    plan = large.plan()

    with pytest.raises(ConfigError, match="no engine would fit here"):
        _require_fit(plan, large)
    _require_fit(plan, dataclasses.replace(large, checks_memory=False))


def test_an_evaluation_that_needs_more_than_training_is_named(launch: Launch) -> None:
    said = ("engine=fsdp", "model.config.vocab_size=32000", "data.eval_split=0.1")
    said += ("training.per_device_eval_batch_size=32", "training.gradient_checkpointing=true")
    request = dataclasses.replace(launch.request, overrides=tuple(map(parse_assignment, said)))
    large = dataclasses.replace(launch, request=request)

    with pytest.raises(ConfigError) as raised:
        _require_fit(large.plan(), large)

    assert (
        "training.per_device_eval_batch_size below 32 might fit (the evaluation needs the most)"
    ) in str(raised.value)
    fewer = dataclasses.replace(
        request,
        overrides=(
            *request.overrides,
            parse_assignment("training.per_device_eval_batch_size=2"),
        ),
    )
    small = dataclasses.replace(large, request=fewer)
    _require_fit(small.plan(), small)


def test_recomputing_is_named_where_it_would_do(launch: Launch) -> None:
    said = (
        parse_assignment("training.per_device_train_batch_size=24"),
        parse_assignment("model.config.num_hidden_layers=4"),
        parse_assignment("model.config.max_position_embeddings=2048"),
    )
    request = dataclasses.replace(launch.request, overrides=(*launch.request.overrides, *said))

    with pytest.raises(ConfigError, match="training.gradient_checkpointing=true would fit"):
        large = dataclasses.replace(launch, request=request)
        _require_fit(large.plan(), large)


# Slurm jobs: the nodes are others than this machine


def _as_job(folder: Path, *words: str, memory_mib: int) -> subprocess.CompletedProcess[str]:
    """Submitted with programs of Slurm's shape; nodes of `memory_mib` in the default partition."""
    programs = folder / "bin"
    programs.mkdir(exist_ok=True)
    texts = {
        "sinfo": f'echo "$@" >>"$HOME/asked"; echo \'usual*|9|64|{memory_mib}|(null)\'',
        "sbatch": 'touch "$HOME/submitted"; echo 7',
    }
    for name, text in texts.items():
        (programs / name).write_text(f"#!/bin/sh\n{text}\n")
        (programs / name).chmod(0o755)
    command = [sys.executable, "-m", "bigtrain", "launch", "run.yaml", "--slurm", "--engine", "ddp"]
    return subprocess.run(
        [*command, "--time", "60", *words],
        cwd=folder,
        env={"PATH": f"{programs}:/usr/bin:/bin", "HOME": str(folder)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "run.yaml").write_text(_RUN)
    return tmp_path


def test_a_job_that_can_not_fit_into_its_nodes_is_not_submitted(folder: Path) -> None:
    refused = _as_job(folder, "--set", "training.use_cpu=true", memory_mib=8192)

    assert refused.returncode == 2
    assert refused.stderr.startswith("error: engine ddp needs ")
    assert "there are 4.0 GiB (the partition's largest node ÷ 2 processes)" in refused.stderr
    assert "--engine auto would fit (fsdp, 2.6 GiB)" in refused.stderr
    assert not (folder / "submitted").exists()
    assert not (folder / "runs").exists()

    said = ("--set", "training.use_cpu=true", "--no-memory-check")
    assert _as_job(folder, *said, memory_mib=8192).returncode == 0
    assert (folder / "submitted").exists()


def test_slurm_is_asked_for_the_nodes_of_a_job_once(folder: Path) -> None:
    done = _as_job(folder, "--set", "training.use_cpu=true", memory_mib=65536)

    assert done.returncode == 0, done.stderr
    assert (folder / "asked").read_text() == "--noheader --exact --format=%P|%D|%c|%m|%G\n"


@pytest.mark.parametrize(
    ("words", "there"),
    [
        (("--sbatch", "mem=6G"), "there are 3.0 GiB (what the job asks for ÷ 2 processes)"),
        (("--sbatch", "mem=0"), "there are 4.0 GiB (the partition's largest node ÷ 2 processes)"),
    ],
)
def test_a_job_has_no_more_memory_than_it_asks_for(
    folder: Path, words: tuple[str, ...], there: str
) -> None:
    refused = _as_job(folder, "--set", "training.use_cpu=true", *words, memory_mib=8192)

    assert there in refused.stderr


def test_a_job_s_gpus_have_what_was_said_and_its_hosts_what_slurm_says(folder: Path) -> None:
    gpus = ("--sbatch", "gpus-per-node=2")

    small = _as_job(folder, *gpus, "--device-memory", "4GiB", memory_mib=65536)
    assert "there are 4.0 GiB (flag --device-memory)" in small.stderr

    offload = ("--set", "engine.offload_optimizer=cpu", "--engine", "zero3")
    low = _as_job(folder, *gpus, *offload, memory_mib=3000)
    assert "engine zero3 offloads " in low.stderr
    assert "the host has 1.5 GiB for it" in low.stderr


def test_a_job_on_gpus_of_unknown_size_and_nodes_of_unknown_memory_is_submitted(
    folder: Path,
) -> None:
    done = _as_job(folder, "--sbatch", "gpus-per-node=2", memory_mib=1)

    assert (done.returncode, (folder / "submitted").exists()) == (0, True), done.stderr


def test_auto_chooses_by_the_memory_of_the_job_s_nodes(folder: Path) -> None:
    words = ("--engine", "auto", "--dry-run", "--set", "training.use_cpu=true")

    small = _as_job(folder, *words, memory_mib=8192)
    large = _as_job(folder, *words, memory_mib=65536)

    assert "auto: the fastest that fits, 2.6 GiB of" in small.stderr
    assert "fsdp" in small.stderr
    assert "auto: the fastest that fits" in large.stderr
    assert "would not fit" not in large.stderr
