"""A run file's whole way, on real processes: through the launcher, torchrun, and alone."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from bigtrain import worker
from bigtrain.device import choose_device
from bigtrain.errors import BigtrainError, ConfigError, DataError, LaunchError
from bigtrain.own_plan import own_plan
from bigtrain.topology import RankInfo

BIN = Path(sys.executable).parent
LAUNCH: tuple[object, ...] = (BIN / "bigtrain", "launch")
TORCHRUN: tuple[object, ...] = (
    *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
    *("-m", "bigtrain.worker"),
)
ALONE: tuple[object, ...] = (sys.executable, "-m", "bigtrain.worker")

RUN: dict[str, Any] = {
    "model": {
        "config": {
            "model_type": "llama",
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 64,
        }
    },
    "tokenizer": {"kind": "bytes"},
    "data": {"train_files": "text.txt", "sequence_length": 32, "eval_split": 0.1},
    "training": {
        "max_steps": 6,
        "per_device_train_batch_size": 4,
        "learning_rate": 0.01,
        "logging_steps": 1,
        "eval_strategy": "steps",
        "eval_steps": 3,
        "eval_on_start": True,
        "save_steps": 3,
        "use_cpu": True,
    },
    "engine": "fsdp",
    "cluster": {"procs_per_node": 2},
    "output_dir": "out",
}


@pytest.fixture
def run_file(tmp_path: Path) -> Path:
    text = "".join(f"Line {n} says that {n} and {n} make {n + n}.\n" for n in range(300))
    (tmp_path / "text.txt").write_text(text)
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(RUN))
    return path


def run(
    command: tuple[object, ...], run_file: Path, *arguments: str, expected: int = 0
) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [str(part) for part in (*command, *arguments, run_file.name)],
        cwd=run_file.parent,
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert done.returncode == expected, f"{done.stdout}\n{done.stderr}"
    return done


def history(output_dir: Path, step: int = 6) -> list[dict[str, Any]]:
    """Losses, norms and evaluation losses, step by step."""
    state = json.loads((output_dir / f"checkpoint-{step}" / "trainer_state.json").read_text())
    kept = ("step", "loss", "grad_norm", "eval_loss")
    return [{key: entry[key] for key in kept if key in entry} for entry in state["log_history"]]


def losses(output_dir: Path) -> list[dict[str, Any]]:
    return [entry for entry in history(output_dir) if "loss" in entry]


def weights(output_dir: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return load_file(output_dir / "model.safetensors")


def test_a_run_ends_with_a_model_that_transformers_loads(run_file: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    done = run(LAUNCH, run_file, "--set", "training.report_to=tensorboard")

    out = run_file.parent / "out"
    evaluated = [entry["eval_loss"] for entry in history(out) if "eval_loss" in entry]
    assert evaluated[0] > 5
    assert evaluated[-1] < evaluated[0] - 1
    assert AutoModelForCausalLM.from_pretrained(out).num_parameters() > 10_000
    assert AutoTokenizer.from_pretrained(out).decode([68, 69]) != ""
    assert f"evaluation loss {evaluated[0]:.3f} → {evaluated[-1]:.3f}" in done.stdout
    assert "▸" in done.stdout
    assert f"model        {out}" in done.stdout
    logs = next((out / "logs" / "attempt-01").glob("node-000-*"))
    names = {path.name for path in logs.iterdir()}
    assert {"agent.log", "rank-00000.log", "rank-00001.log", "metrics.jsonl"} <= names
    assert (out / "plans" / "attempt-01.json").is_file()
    assert list((out / "tensorboard").glob("events.*"))
    for noise in ("Warning", "WARNING", "gloo", "DeepSpeed", "shards", "NCCL", "TCPStore"):
        assert noise not in done.stdout + done.stderr, f"{done.stdout}\n{done.stderr}"


def test_a_run_that_exports_never_ends_with_its_checkpoints_alone(run_file: Path) -> None:
    words = ("--set", "training.export=never", "--engine", "single")
    once = ("--set", "training.eval_strategy=no", "--set", "training.eval_on_start=false")
    done = run(ALONE, run_file, *words, *once)
    assert "evaluation loss" in done.stderr + done.stdout
    assert "→" not in done.stderr + done.stdout, "there was one evaluation"
    out = run_file.parent / "out"
    assert (out / "checkpoint-6").is_dir()
    assert not list(out.glob("*.safetensors*")) + list(out.glob("config.json"))


def test_an_evaluation_without_training_is_of_the_checkpoint(run_file: Path) -> None:
    run(LAUNCH, run_file)
    out = run_file.parent / "out"
    written = (out / "model.safetensors").stat().st_mtime_ns
    losses = {entry["step"]: entry["eval_loss"] for entry in history(out) if "eval_loss" in entry}

    words = ("--set", "training.do_train=false", "--json")
    for resume, step in (("auto", 6), (str(out / "checkpoint-3"), 3)):
        done = run(LAUNCH, run_file, *words, "--engine", "ddp", "--resume", resume)
        events = [json.loads(line) for line in done.stdout.splitlines()]
        (evaluated,) = [event for event in events if event["kind"] == "evaluated"]
        assert evaluated["step"] == step
        assert evaluated["eval_loss"] == pytest.approx(losses[step], rel=1e-4)
        assert events[-1] == {
            "kind": "end",
            "exit_code": 0,
            "output_dir": str(out),
            "checkpoint": str(out / "checkpoint-6") if resume == "auto" else None,
        }
        assert not any("model  " in str(event.get("text")) for event in events)
    assert (out / "model.safetensors").stat().st_mtime_ns == written


def test_the_launcher_torchrun_and_one_process_alone_train_alike(run_file: Path) -> None:
    run(LAUNCH, run_file, "--output-dir", "launched")
    run(TORCHRUN, run_file, "--output-dir", "torchrun")
    batch = ("--set", "training.per_device_train_batch_size=8", "--engine", "single")
    run(ALONE, run_file, "--output-dir", "alone", *batch)

    launched = history(run_file.parent / "launched")
    assert history(run_file.parent / "torchrun") == launched
    for one, other in zip(history(run_file.parent / "alone"), launched, strict=True):
        # An evaluation's mean is over batches, and the last one is smaller on one process.
        tolerance = 1e-3 if "eval_loss" in one else 1e-5
        assert one == pytest.approx(other, rel=tolerance)
    # Torchrun's ranks came to one plan, and recorded it once.
    plans = list((run_file.parent / "torchrun" / "plans").iterdir())
    assert [path.name for path in plans] == ["attempt-01.json"]
    assert json.loads(plans[0].read_text())["topology"]["procs_per_node"] == 2
    # And their logs lie where the launcher's do.
    logs = [
        sorted(path.name for path in (run_file.parent / way).glob("logs/attempt-01/*/rank-*.log"))
        for way in ("launched", "torchrun")
    ]
    assert logs[0] == logs[1] == ["rank-00000.log", "rank-00001.log"]


def test_a_run_goes_on_from_its_newest_checkpoint_to_the_same_weights(run_file: Path) -> None:
    import torch

    run(LAUNCH, run_file, "--output-dir", "whole")
    shutil.copytree(run_file.parent / "whole", run_file.parent / "cut")
    shutil.rmtree(run_file.parent / "cut" / "checkpoint-6")
    (run_file.parent / "cut" / "model.safetensors").unlink()

    done = run(
        LAUNCH, run_file, "--output-dir", "cut", "--set", "training.overwrite_output_dir=true"
    )

    assert "going on from" in done.stdout
    assert "checkpoint-3" in done.stdout
    whole, cut = weights(run_file.parent / "whole"), weights(run_file.parent / "cut")
    assert all(torch.equal(whole[name], cut[name]) for name in whole)
    assert losses(run_file.parent / "cut") == losses(run_file.parent / "whole")


@pytest.mark.parametrize(
    "engine",
    [
        "zero3",
        pytest.param("ddp", marks=pytest.mark.slow),
        pytest.param("zero1", marks=pytest.mark.slow),
        pytest.param("zero2", marks=pytest.mark.slow),
    ],
)
def test_every_engine_leaves_the_same_model(run_file: Path, engine: str) -> None:
    import torch

    run(LAUNCH, run_file, "--engine", engine, "--output-dir", engine)
    run(LAUNCH, run_file, "--output-dir", "fsdp")

    ours, reference = weights(run_file.parent / engine), weights(run_file.parent / "fsdp")
    assert ours.keys() == reference.keys()
    for name, value in reference.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-4, atol=1e-5, msg=name)


def test_a_model_is_tuned_from_its_directory_without_packing(run_file: Path) -> None:
    run(LAUNCH, run_file)

    done = run(
        LAUNCH,
        run_file,
        *("--set", "model={name: out}", "--set", "tokenizer={name: out}"),
        *("--set", "data.packing=false", "--output-dir", "tuned"),
    )

    tuned = [entry for entry in history(run_file.parent / "tuned") if "eval_loss" in entry]
    assert tuned[0]["eval_loss"] < 5
    assert tuned[-1]["eval_loss"] < tuned[0]["eval_loss"]
    assert "270 sequences to train on, 30 to evaluate on" in done.stdout


@pytest.mark.parametrize(
    ("setting", "error", "message"),
    [
        (
            "model.config.hiden_size=3",
            ConfigError,
            "model.config.hiden_size: unknown key; did you mean 'hidden_size'?",
        ),
        ("data.eval_split=0.999", DataError, "leaves none to train on"),
        ("data.sequence_length=128", ConfigError, "but data.sequence_length is 128"),
    ],
)
def test_a_mistake_is_named_before_anything_starts(
    run_file: Path,
    monkeypatch: pytest.MonkeyPatch,
    setting: str,
    error: type[BigtrainError],
    message: str,
) -> None:
    monkeypatch.chdir(run_file.parent)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    arguments = [run_file.name, "--engine", "single", "--set", setting]

    with pytest.raises(error) as raised:
        plan = own_plan(arguments, world=RankInfo(), environment=os.environ)
        worker.run(plan, world=RankInfo(), is_own=True)

    assert message in str(raised.value)
    assert not (run_file.parent / "out").exists()


@pytest.mark.parametrize("how", ["launched", "alone"])
def test_a_mistake_ends_in_its_message_alone_and_its_exit_code(run_file: Path, how: str) -> None:
    command = LAUNCH if how == "launched" else (*ALONE, "--engine", "single")

    done = run(command, run_file, "--set", "data.eval_split=0.999", expected=3)

    assert "leaves none to train on" in done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr


def test_words_of_fsdp_that_transformers_refuses_are_the_plan_s_alone(tmp_path: Path) -> None:
    training = {"fsdp": "hybrid_shard", "use_cpu": True, "report_to": "none"}
    plan: Any = SimpleNamespace(training=training, output_dir=str(tmp_path))

    assert not worker._arguments(plan).fsdp


def test_a_cpu_run_needs_no_accelerator() -> None:
    assert choose_device("cpu", world=RankInfo()).type == "cpu"


@pytest.mark.skipif(Path("/dev/nvidia0").exists(), reason="this machine has a GPU")
def test_a_gpu_run_without_a_gpu_is_refused() -> None:
    with pytest.raises(LaunchError, match="this rank sees no GPU"):
        choose_device("cuda", world=RankInfo())
