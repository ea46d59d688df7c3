"""What is to come of a plan: memory, disk and steps; which engine fits; the ready configs."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bigtrain.errors import ConfigError
from bigtrain.layers import parse_assignment
from bigtrain.plan import RunPlan, write_plan
from bigtrain.planning import Request, Surroundings, compare_engines, make_plan
from bigtrain.planning.device_memory import DeviceMemory
from bigtrain.planning.engine_choice import Candidate, candidates, choose
from bigtrain.planning.forecast import Forecast, forecast, make_schedule, read_bytes, verdict
from bigtrain.share import share_root

_GPU = 80 << 30
# Run file → what is taken on 1, 2 and 16 nodes of eight GPUs with 80 GiB.
_READY = {
    "llama3-8b": ("zero1", "zero1", "zero1"),
    "llama3-70b": ("zero3 (offload_optimizer cpu)", "zero3 (offload_optimizer cpu)", "fsdp"),
    "qwen2.5-7b": ("zero1", "zero1", "zero1"),
    "mixtral-8x7b": ("zero3 (offload_optimizer cpu)", "zero3", "zero3"),
    "llama3-8b-lora": ("ddp", "ddp", "ddp"),
}
_RUN = """\
model:
  config: {model_type: llama, hidden_size: 64}
tokenizer: {kind: bytes}
data: {name: builtin:python-docs, sequence_length: 128}
training: {per_device_train_batch_size: 4, max_steps: 100, save_steps: 30, save_total_limit: 2}
"""


def _plan(target: str, *assignments: str, memory: int | None = _GPU, folder: Path) -> RunPlan:
    request = Request(target=target, overrides=tuple(map(parse_assignment, assignments)))
    surroundings = Surroundings(
        environment={"CUDA_VISIBLE_DEVICES": "", "XDG_CACHE_HOME": str(folder / "cache")},
        working_dir=folder,
        is_rehearsal=True,
        device_memory=memory,
    )
    return make_plan(request, surroundings)


def _forecast(plan: RunPlan, folder: Path) -> Forecast:
    return forecast(
        plan,
        environment={"XDG_CACHE_HOME": str(folder / "cache")},
        device_memory=DeviceMemory(total=_GPU, origin="said", device="cuda"),
    )


@pytest.mark.parametrize(
    ("name", "nodes", "engine"),
    [
        (name, nodes, engine)
        for name, engines in _READY.items()
        for nodes, engine in zip((1, 2, 16), engines, strict=True)
    ],
)
def test_every_ready_config_is_planned_and_fits(
    name: str, nodes: int, engine: str, tmp_path: Path
) -> None:
    path = share_root() / "configs" / f"{name}.yaml"

    plan = _plan(str(path), f"cluster.nodes={nodes}", folder=tmp_path)
    found = _forecast(plan, tmp_path)

    assert plan.topology.world_size == nodes * 8
    assert plan.origins["engine.name"].startswith("auto: the fastest that fits")
    assert str(_way(plan)) == engine
    assert found.memory is not None
    assert verdict(found.memory, found.device_memory) == "fits"
    assert '"auto"' not in json.dumps(dataclasses.asdict(plan.engine))


def test_an_evaluation_that_decides_on_the_engine_is_named(tmp_path: Path) -> None:
    target = str(share_root() / "configs" / "llama3-8b.yaml")

    plan = _plan(target, "training.per_device_eval_batch_size=4", folder=tmp_path)

    assert plan.engine.name == "zero2"
    assert plan.origins["engine.name"].endswith(
        "; most of it in the evaluation: see training.per_device_eval_batch_size"
    )


@pytest.mark.parametrize("is_at_start", [False, True])
def test_an_evaluation_before_the_first_step_is_counted(is_at_start: bool, tmp_path: Path) -> None:
    said = f"eval_on_start: {str(is_at_start).lower()}, do_eval: false"
    run = _RUN.replace("128}", "128, eval_split: 0.1}")
    run = run.replace("{per_device", f"{{{said}, per_device")
    (tmp_path / "run.yaml").write_text(run)

    found = _forecast(_plan("run.yaml", folder=tmp_path), tmp_path)

    assert found.memory is not None
    names = [moment.name for moment in found.memory.moments]
    assert ("evaluation" in names) == is_at_start


def _way(plan: RunPlan) -> Candidate:
    said = dataclasses.asdict(plan.options)
    options = tuple((key, value) for key, value in said.items() if value is not None)
    return Candidate(engine=plan.engine.name, options=options)


def test_steps_checkpoints_and_disk_are_counted(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(_RUN)

    found = _forecast(_plan("run.yaml", folder=tmp_path), tmp_path)

    assert found.model.shapes is not None
    assert found.disk is not None
    assert (found.schedule.steps, found.schedule.checkpoints) == (100, 4)
    assert found.schedule.tokens_per_step == 4 * 128
    assert found.disk.kept == 2
    state = 12 * found.model.shapes.numel
    assert state < found.disk.checkpoint < state + (4 << 20)


def test_a_checkpoint_takes_what_is_forecast(tmp_path: Path) -> None:
    """Within the small files that are not counted one by one."""
    (tmp_path / "run.yaml").write_text(_RUN)
    assignments = ("training.max_steps=2", "model.config.num_hidden_layers=1", "engine=single")
    assignments += ("training.save_steps=2", "training.report_to=none")
    plan = _plan("run.yaml", *assignments, memory=None, folder=tmp_path)
    found = _forecast(plan, tmp_path)
    path = tmp_path / "plan.json"
    write_plan(plan, path)

    subprocess.run(
        [sys.executable, "-m", "bigtrain.worker"],
        env=os.environ | {"BIGTRAIN_PLAN": str(path), "PYTHONPATH": str(_root())},
        cwd=tmp_path,
        check=True,
        capture_output=True,
    )

    files = (tmp_path / "runs" / "run" / "checkpoint-2").rglob("*")
    written = sum(file.stat().st_size for file in files if file.is_file())
    assert found.disk is not None
    assert written == pytest.approx(found.disk.checkpoint, abs=3 << 20)


def _root() -> Path:
    return share_root() if (share_root() / "bigtrain").is_dir() else Path.cwd()


def test_the_least_sharding_that_fits_is_taken() -> None:
    class Memory:
        def __init__(self, peak: int, host: int = 0) -> None:
            self.peak, self.host = peak, host

    needs = {"ddp": 90, "zero1": 70, "zero2": 60, "fsdp": 50, "zero3": 40}
    ways = list(candidates(nodes=1, procs_per_node=8, on_gpu=True))

    def pick(total: int) -> Any:
        return choose(
            ways,
            memory_of=lambda way: Memory(needs[way.engine] << 30),  # type: ignore[arg-type]
            device_memory=DeviceMemory(total=total << 30, device="cuda"),
        )

    assert pick(120).candidate == Candidate(engine="ddp")
    assert pick(80).candidate == Candidate(engine="zero1")
    assert pick(58).candidate == Candidate(engine="fsdp")
    assert "ddp, zero1, zero2 would not fit" in pick(58).why
    assert pick(20).why.startswith("auto: nothing fits")


def test_offload_that_the_host_can_not_hold_is_passed_over(tmp_path: Path) -> None:
    class Memory:
        peak, host = 10 << 30, 30 << 30

    way = Candidate(engine="zero3", options=(("offload_optimizer", "cpu"),))

    def pick(host: int) -> Any:
        return choose(
            [way],
            memory_of=lambda way: Memory(),  # type: ignore[return-value,arg-type]
            device_memory=DeviceMemory(total=40 << 30, device="cuda", host=host << 30),
        )

    assert pick(40).why.endswith("and 30.0 GiB of the host's memory")
    assert pick(20).why.startswith("auto: nothing fits")


def test_a_said_shard_stands_when_auto_compares_engines(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(
        _RUN + "cluster: {procs_per_node: 4, nodes: 2}\nengine: {shard: 2}\n"
    )
    surroundings = Surroundings(environment={}, working_dir=tmp_path, is_rehearsal=True)

    found = compare_engines(Request(target="run.yaml"), surroundings)

    shards = {str(way): plan.topology.shard_size for way, plan, _ in found if plan is not None}
    assert shards == {"fsdp": 2}


def test_state_on_nvme_is_told_apart_from_the_host_s(tmp_path: Path) -> None:
    target = str(share_root() / "configs" / "llama3-70b.yaml")
    said = ("engine.name=zero3", "engine.offload_optimizer=nvme", "engine.nvme_path=/local")
    plan = _plan(target, *said, "cluster.procs_per_node=8", folder=tmp_path)
    memory = _forecast(plan, tmp_path).memory

    assert memory is not None and plan.topology.world_size >= 8
    own = _forecast(plan, tmp_path).model.shapes.numel / plan.topology.world_size  # type: ignore[union-attr]
    assert memory.nvme == pytest.approx(12 * own, rel=0.01)
    assert memory.state.optimizer == memory.state.masters == 0
    assert 4 * own < memory.host < 4 * own + 4 * 4 * own * 1.01


def test_checkpoints_without_a_limit_are_not_bounded(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(_RUN)
    unlimited = ("training.max_steps=-1", "training.save_total_limit=null")

    found = _forecast(_plan("run.yaml", *unlimited, folder=tmp_path), tmp_path)

    assert found.disk is not None
    assert (found.disk.kept, found.disk.peak) == (None, None)
    limited = _forecast(_plan("run.yaml", "training.max_steps=-1", folder=tmp_path), tmp_path)
    assert limited.disk is not None and limited.disk.kept == 2


@pytest.mark.parametrize(
    ("said", "kept"),
    [
        (("save_total_limit=-1",), 4),
        (("save_total_limit=0",), 4),
        (("save_total_limit=1",), 1),
        (("save_total_limit=1", "load_best_model_at_end=true"), 2),
        (("save_total_limit=1", "metric_for_best_model=loss"), 2),
        (("save_total_limit=3", "load_best_model_at_end=true"), 3),
        (("save_total_limit=9",), 4),
    ],
)
def test_as_many_checkpoints_are_counted_as_the_trainer_keeps(
    said: tuple[str, ...], kept: int, tmp_path: Path
) -> None:
    run = _RUN.replace("128}", "128, eval_split: 0.1}")
    (tmp_path / "run.yaml").write_text(run)
    cadence = ("eval_strategy=steps", "eval_steps=30", *said)

    plan = _plan("run.yaml", *(f"training.{value}" for value in cadence), folder=tmp_path)
    disk = _forecast(plan, tmp_path).disk

    assert disk is not None and disk.peak is not None
    assert disk.kept == kept
    assert disk.peak - disk.model == (kept + 1) * disk.checkpoint


@pytest.mark.parametrize(("epochs", "checkpoints"), [("0.5", 1), ("1.5", 2), ("2", 2)])
def test_the_end_of_a_part_of_an_epoch_is_saved_too(
    epochs: str, checkpoints: int, tmp_path: Path
) -> None:
    """As a run with these does it."""
    (tmp_path / "run.yaml").write_text(_RUN)
    said = ("save_strategy=epoch", "max_steps=-1", f"num_train_epochs={epochs}")

    plan = _plan("run.yaml", *(f"training.{value}" for value in said), folder=tmp_path)

    assert make_schedule(plan).checkpoints == checkpoints


def test_an_optimizer_whose_state_is_not_known_is_said_so(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(_RUN)

    said = ("training.optim=galore_adamw", "--device-memory", "80GiB")
    done = _command(tmp_path, "run.yaml", "--set", *said)

    assert "as Adam's: what galore_adamw keeps is not known" in done.stdout, done.stderr
    assert "galore_adamw needs galore_torch, which is not installed" in done.stdout
    shown = _command(tmp_path, "run.yaml", "--set", *said, "--json")
    assert json.loads(shown.stdout)["forecast"]["memory"]["unknown_optimizer"] == "galore_adamw"


def test_what_is_missing_and_what_a_launch_refuses_is_told_to_programs_too(tmp_path: Path) -> None:
    """T5 in the hub's cache, whose directory is not looked at before the model is asked."""
    repository = tmp_path / "hub" / "models--a--b"
    (repository / "snapshots" / "c0ffee").mkdir(parents=True)
    (repository / "snapshots" / "c0ffee" / "config.json").write_text('{"model_type": "t5"}')
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("c0ffee")
    (tmp_path / "run.yaml").write_text(
        "model: a/b\ntokenizer: {kind: bytes}\ndata: {train_files: gone.txt}\nengine: single\n"
    )
    said = ("run.yaml", "--set", f"cluster.env.HF_HOME={tmp_path}", "--device-memory", "80GiB")

    text = _command(tmp_path, *said).stdout
    found = json.loads(_command(tmp_path, *said, "--json").stdout)

    (missing,), (refused,) = found["missing"], found["refused"]
    assert missing.startswith("run.yaml:3: data.train_files: ")
    assert refused.startswith("model: it can't be built to measure its memory: ValueError: Unrec")
    assert f"Launch will refuse it\n  {refused}" in text
    assert f"Missing on this machine\n  {missing}" in text
    assert f"unknown  {refused}" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("run.yaml", "--diff", "run.yaml", "--compare"), "--compare: --diff compares plans"),
        (("run.yaml", "--diff", "run.yaml", "--trace"), "--trace: --diff compares plans"),
        (("train.py", "--trace"), "--trace: train.py is a script, whose model is its own"),
    ],
)
def test_flags_that_ask_two_things_are_refused(
    tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    (tmp_path / "run.yaml").write_text(_RUN)
    (tmp_path / "train.py").write_text("import torch\n")

    done = _command(tmp_path, *arguments)

    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {message}")


def test_sharding_within_a_node_comes_before_sharding_over_all() -> None:
    ways = list(candidates(nodes=2, procs_per_node=8, on_gpu=False))

    assert [str(way) for way in ways] == [
        "ddp",
        "zero1",
        "zero2",
        "fsdp (shard 8)",
        "fsdp",
        "zero3",
    ]


def test_engines_are_compared_and_those_that_can_not_run_say_why(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(_RUN + "cluster: {procs_per_node: 2}\n")
    surroundings = Surroundings(environment={}, working_dir=tmp_path, is_rehearsal=True)

    found = compare_engines(Request(target="run.yaml"), surroundings)

    planned = {str(way): plan is not None for way, plan, _ in found}
    assert planned["single"] is False
    assert all(planned[name] for name in ("ddp", "fsdp", "zero1", "zero2", "zero3"))


@pytest.mark.parametrize(
    ("text", "number"), [("80GiB", 80 << 30), ("40 GB", 40 * 10**9), ("85899345920", 80 << 30)]
)
def test_sizes_are_read(text: str, number: int) -> None:
    assert read_bytes(text, label="--device-memory") == number


@pytest.mark.parametrize("text", ["lots", "80", "80iB", "9" * 400 + "GiB"])
def test_a_size_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ConfigError) as raised:
        read_bytes(text, label="--device-memory")
    assert str(raised.value) == f"--device-memory {text:.60}: not a size; write 80GiB, for example"


def _command(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "bigtrain", "plan", *arguments],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(_root())},
        capture_output=True,
        text=True,
        check=False,
    )


def test_two_run_files_and_a_past_run_are_told_apart(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(_RUN)
    (tmp_path / "b.yaml").write_text(_RUN.replace("max_steps: 100", "max_steps: 7"))

    shown = _command(tmp_path, "a.yaml", "--diff", "b.yaml", "--json")
    past = _plan("b.yaml", "output_dir=past", memory=None, folder=tmp_path)
    write_plan(past, tmp_path / "past" / "plans" / "attempt-01.json")
    recorded = _command(tmp_path, "a.yaml", "--diff", "past", "--json")

    for done in (shown, recorded):
        found = {entry["key"]: entry for entry in json.loads(done.stdout)}
        assert found["training.max_steps"]["values"] == ["100", "7"]
        assert found["training.max_steps"]["origins"] == ["a.yaml:5", "b.yaml:5"]
    assert _command(tmp_path, "a.yaml", "--diff", "a.yaml").stdout == (
        "a.yaml and a.yaml plan the same run\n"
    )


def test_a_trillion_parameters_on_2048_nodes_are_planned_at_once(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(
        "model:\n"
        "  config: {model_type: llama, hidden_size: 25600, intermediate_size: 81920,\n"
        "    num_hidden_layers: 130, num_attention_heads: 160, num_key_value_heads: 8,\n"
        "    vocab_size: 128256, max_position_embeddings: 4096}\n"
        "tokenizer: {kind: bytes}\n"
        "data: {name: builtin:python-docs, sequence_length: 4096}\n"
        "global_batch_size: 16384\n"
        "training: {bf16: true, per_device_train_batch_size: 1, gradient_checkpointing: true}\n"
    )
    arguments = ("--nodes", "2048", "--procs-per-node", "8", "--device-memory", "80GiB", "--json")

    done = subprocess.run(
        [sys.executable, "-c", _MEASURED, "plan", "run.yaml", *arguments],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(_root())},
        capture_output=True,
        text=True,
        check=True,
    )

    found = json.loads(done.stdout)
    assert found["topology"]["nodes"] == 2048
    assert found["forecast"]["parameters"]["count"] > 10**12
    seconds, kilobytes = done.stderr.split()
    assert float(seconds) < 1.0, "of processor time: others may be busy beside it"
    assert int(kilobytes) * 1024 < 200 * 10**6


_MEASURED = """
import re, sys, time
from pathlib import Path
from bigtrain.cli import main
try:
    main()
finally:
    status = Path("/proc/self/status").read_text()
    print(time.process_time(), re.search(r"VmHWM:\\s+(\\d+)", status)[1], file=sys.stderr)
"""


def test_frozen_weights_in_the_arithmetic_s_precision_are_not_cast(tmp_path: Path) -> None:
    target = str(share_root() / "configs" / "llama3-8b-lora.yaml")
    plan = _plan(target, "cluster.nodes=1", "cluster.procs_per_node=8", folder=tmp_path)
    found = _forecast(plan, tmp_path)

    assert found.memory is not None and found.model.shapes is not None
    assert plan.engine.name == "ddp"
    assert found.memory.activations < found.model.shapes.numel  # half of what all copies take


def test_what_plan_shows_as_json_can_be_compared_with(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(_RUN)
    (tmp_path / "shown.json").write_text(_command(tmp_path, "run.yaml", "--json").stdout)

    done = _command(tmp_path, "run.yaml", "--diff", "shown.json")

    assert done.stdout == "run.yaml and shown.json plan the same run\n", done.stderr
