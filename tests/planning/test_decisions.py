"""From a command line to a plan: what is derived, what is refused, and whose directory it is."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from bigtrain.cluster import threads
from bigtrain.errors import BigtrainError, ConfigError, UnsupportedError
from bigtrain.layers import parse_assignment
from bigtrain.plan import RunPlan, write_plan
from bigtrain.planning import Request, Surroundings, make_plan
from bigtrain.planning.output_dir import plan_path
from bigtrain.topology import RankInfo

RUN = """\
model:
  config: {model_type: llama, hidden_size: 64}
tokenizer: {kind: bytes}
data: {name: builtin:python-docs, sequence_length: 128}
training:
  per_device_train_batch_size: 4
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "quick.yaml").write_text(RUN)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    return tmp_path


def _make(folder: Path, *assignments: str, target: str = "quick.yaml", **more: Any) -> RunPlan:
    request = Request(
        target=target,
        overrides=tuple(parse_assignment(text) for text in assignments),
        resume=more.pop("resume", None),
        script_args=more.pop("script_args", ()),
    )
    surroundings = Surroundings(
        environment={"CUDA_VISIBLE_DEVICES": ""}, working_dir=folder, **more
    )
    return make_plan(request, surroundings)


def _fault(folder: Path, *assignments: str, **more: Any) -> str:
    with pytest.raises(BigtrainError) as raised:
        _make(folder, *assignments, **more)
    return str(raised.value)


def test_a_plan_holds_what_the_run_file_said_and_what_follows(folder: Path) -> None:
    plan = _make(folder, "cluster.procs_per_node=2")

    assert plan.kind == "run_file"
    assert (plan.name, plan.attempt, plan.resume) == ("quick", 1, "auto")
    assert plan.source == str(folder / "quick.yaml")
    assert plan.output_dir == str(folder / "runs/quick")
    assert (plan.topology.world_size, plan.device) == (2, "cpu")
    assert plan.training == {"per_device_train_batch_size": 4}
    assert plan.engine.name == "ddp"
    assert plan.origins["engine.name"].startswith("auto: the fastest that fits, 3.8 GiB of ")
    assert plan.origins["training.per_device_train_batch_size"] == "quick.yaml:6"
    assert plan.threads_per_rank == threads.per_rank(2)
    assert RunPlan.from_json(plan.to_json()) == plan


@pytest.mark.parametrize(
    ("assignments", "engine"),
    [
        ((), "single"),
        (("cluster.procs_per_node=2",), "ddp"),
        (("cluster.procs_per_node=2", "model=nowhere/there"), "fsdp"),
        (("cluster.procs_per_node=2", "training.fsdp=full_shard"), "fsdp"),
        (("training.deepspeed={zero_optimization: {stage: 2}}",), "zero2"),
        (("engine=ddp",), "ddp"),
    ],
)
def test_the_engine_is_chosen(folder: Path, assignments: tuple[str, ...], engine: str) -> None:
    assert _make(folder, *assignments).engine.name == engine


def test_the_worker_s_imports_are_known_beforehand(folder: Path) -> None:
    preload = _make(folder, "engine=zero3", "training.report_to=tensorboard").preload

    assert preload[:2] == ("torch", "bigtrain.worker")
    assert "deepspeed" in preload
    assert "transformers.models.llama.modeling_llama" in preload
    assert "torch.utils.tensorboard" in preload


def test_a_local_model_s_config_sizes_the_buckets(folder: Path) -> None:
    (folder / "model").mkdir()
    (folder / "model/pytorch_model.bin").touch()
    (folder / "model/config.json").write_text(json.dumps({"model_type": "gpt2", "n_embd": 1000}))
    (folder / "model/tokenizer_config.json").write_text("{}")
    assignments = ("engine=zero2", "model=model", "tokenizer=null")

    settings: Any = _make(folder, "model.config=null", *assignments).engine.settings

    assert settings.json["zero_optimization"]["reduce_bucket_size"] == 1_000_000


def test_a_global_batch_becomes_accumulation(folder: Path) -> None:
    plan = _make(folder, "cluster.procs_per_node=2", "global_batch_size=24")

    assert plan.training["gradient_accumulation_steps"] == 3
    assert plan.origins["training.gradient_accumulation_steps"] == "derived"
    fate = next(f for f in plan.fates if f.argument == "gradient_accumulation_steps")
    assert (fate.fate, fate.detail) == ("derived", "global_batch_size 24 ÷ (4 × 2 processes)")


def test_a_global_batch_that_does_not_divide_is_refused_with_what_would(folder: Path) -> None:
    assert _fault(folder, "cluster.procs_per_node=2", "global_batch_size=20") == (
        "--set: global_batch_size: 20 is not divisible by 4 "
        "(training.per_device_train_batch_size) × 2 (processes) = 8; use 16 or 24, or "
        "per_device_train_batch_size 1, 2, 5, 10"
    )


def test_faults_of_the_batch_and_of_the_engine_are_told_together(folder: Path) -> None:
    fault = _fault(
        folder, "global_batch_size=6", "engine=zero2", "training.fp16=true", "training.bf16=true"
    )

    assert fault == (
        "--set: global_batch_size: 6 is not divisible by 4 "
        "(training.per_device_train_batch_size) × 1 (processes) = 4; use 4 or 8, or "
        "per_device_train_batch_size 1, 2, 3, 6\n"
        "--set: training.fp16: bf16 and fp16 are both true; keep one of them"
    )


def test_accumulation_that_contradicts_the_global_batch_is_refused(folder: Path) -> None:
    fault = _fault(folder, "global_batch_size=8", "training.gradient_accumulation_steps=3")

    assert fault == (
        "--set: training.gradient_accumulation_steps: 3, but global_batch_size 8 (--set) needs 2; "
        "leave one of them out"
    )


def test_more_processes_than_the_cores_can_share_are_refused(folder: Path) -> None:
    most = threads.most_ranks()

    assert _fault(folder, f"cluster.procs_per_node={most + 1}") == (
        f"--set: cluster.procs_per_node: {most + 1} processes are more than this machine's "
        f"{threads.available_cores()} CPU cores can share; use {most} or fewer"
    )
    assert _make(folder, f"cluster.procs_per_node={most + 1}", is_rehearsal=True)


def test_another_launcher_s_world_is_taken_as_it_is(folder: Path) -> None:
    world = RankInfo(
        rank=5, local_rank=1, node_rank=1, world_size=8, local_world_size=4, source="torchrun"
    )

    plan = _make(folder, "cluster.procs_per_node=2", world=world)

    assert (plan.topology.nodes, plan.topology.procs_per_node) == (2, 4)
    assert plan.origins["cluster.procs_per_node"] == "torchrun's variables"


def test_a_shard_that_does_not_divide_is_refused(folder: Path) -> None:
    assert _fault(folder, "cluster.procs_per_node=2", "engine={name: fsdp, shard: 3}") == (
        "--set: engine.shard: world size 2 is not divisible by shard size 3; use 1, 2"
    )


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("quik.yaml", "quik.yaml: there is no such file; did you mean quick.yaml?"),
        ("xyz", "xyz: there is no such file"),
        (".", ". is a directory; give a run file (.yaml) or a script (.py)"),
        ("notes.txt", "notes.txt: give a run file (.yaml) or a script (.py)"),
    ],
)
def test_a_target_that_is_none_is_refused(folder: Path, target: str, message: str) -> None:
    (folder / "notes.txt").touch()

    assert _fault(folder, target=target) == message


def test_a_run_file_takes_no_script_arguments(folder: Path) -> None:
    assert _fault(folder, script_args=("--lr", "1")) == (
        "quick.yaml is a run file and takes no arguments (--lr 1); use --set section.key=value"
    )


def test_a_script_is_planned_with_its_arguments(folder: Path) -> None:
    (folder / "train.py").write_text("import torch\nfrom bigtrain import Trainer\n")

    plan = _make(folder, target="train.py", script_args=("--lr", "1"))

    assert (plan.kind, plan.name, plan.script_args) == ("script", "train", ("--lr", "1"))
    assert (plan.start_method, plan.start_reason) == ("fork", "")
    assert plan.preload == ("torch", "bigtrain", "bigtrain.trainer", "bigtrain.engine.single")
    assert plan.training == {}


def test_a_script_that_can_not_be_forked_starts_fresh_unless_told_otherwise(folder: Path) -> None:
    (folder / "train.py").write_text("import os\nos.environ['A'] = '1'\nimport torch\n")

    plan = _make(folder, target="train.py")
    assert (plan.start_method, plan.preload) == ("fresh", ())
    assert plan.start_reason == "train.py:2 sets an environment variable before its imports"
    assert _make(folder, "cluster.start=fork", target="train.py").start_method == "fork"


def test_the_second_launch_of_a_run_is_its_second_attempt(folder: Path) -> None:
    first = _make(folder)
    write_plan(first, plan_path(first))

    second = _make(folder, "training.max_steps=5")

    assert second.attempt == 2
    assert len(first.run_id) == 32
    assert second.run_id == first.run_id
    assert _make(folder, resume="never").run_id != first.run_id


def test_what_began_anew_has_done_so_until_a_checkpoint_is_named(folder: Path) -> None:
    def attempt(resume: str | None) -> RunPlan:
        plan = _make(folder, resume=resume)
        write_plan(plan, plan_path(plan))
        return plan

    assert attempt(None).begun_anew == ""
    anew = attempt("never")
    assert anew.begun_anew
    assert attempt(None).begun_anew == attempt("auto").begun_anew == anew.begun_anew
    assert attempt("never").begun_anew > anew.begun_anew
    (folder / "checkpoint-3").mkdir()
    (folder / "checkpoint-3" / "optimizer.pt").touch()
    assert attempt("checkpoint-3").begun_anew == ""


def test_another_run_s_directory_is_refused_with_the_ways_out(folder: Path) -> None:
    first = _make(folder, "output_dir=out")
    write_plan(first, plan_path(first))
    ways = "give another --output-dir, or go on in it with --set training.overwrite_output_dir=true"
    out = folder / "out"
    # An attempt that has left no model and no checkpoint owns nothing.
    assert _make(folder, "output_dir=out", "model.config.hidden_size=32").attempt == 2
    (out / "checkpoint-5").mkdir()

    assert _fault(folder, "output_dir=out", "name=other") == (
        f"--set: output_dir: {out} belongs to the run 'quick', and this one is 'other'; {ways}"
    )
    assert _fault(folder, "output_dir=out", "model.config.hidden_size=32") == (
        f"--set: output_dir: {out} belongs to a run 'quick' of another model; {ways}"
    )
    over = _make(folder, "output_dir=out", "name=other", "training.overwrite_output_dir=true")
    assert over.attempt == 2


def test_a_directory_with_strange_files_is_refused(folder: Path) -> None:
    (folder / "out").mkdir()
    (folder / "out/.gitkeep").touch()
    assert _make(folder, "output_dir=out").attempt == 1

    (folder / "out/thesis.pdf").touch()
    assert "holds files that are not this run's (thesis.pdf)" in _fault(folder, "output_dir=out")


@pytest.mark.parametrize(
    ("flag", "argument", "resume"),
    [
        (None, None, "auto"),
        (None, "true", "auto"),
        (None, "false", "never"),
        ("never", "true", "never"),
        ("auto", "false", "auto"),
    ],
)
def test_where_to_go_on_is_said_by_the_flag_and_then_by_the_argument(
    folder: Path, flag: str | None, argument: str | None, resume: str
) -> None:
    said = () if argument is None else (f"training.resume_from_checkpoint={argument}",)

    plan = _make(folder, *said, resume=flag)

    assert plan.resume == resume
    assert "resume_from_checkpoint" not in plan.training


def test_resuming_from_a_directory_that_holds_no_checkpoint_is_refused(folder: Path) -> None:
    (folder / "empty").mkdir()

    with pytest.raises(BigtrainError) as raised:
        _make(folder, resume="empty")

    assert str(folder / "empty") in str(raised.value)
    assert not isinstance(raised.value, ConfigError)
    assert raised.value.exit_code == 4


_ACCELERATE = """\
distributed_type: DEEPSPEED
num_processes: 2
mixed_precision: bf16
deepspeed_config: {zero_stage: 2, gradient_clipping: 0.7, gradient_accumulation_steps: 2}
"""


def _with_accelerate(folder: Path, run: str, *assignments: str) -> RunPlan:
    (folder / "acc.yaml").write_text(_ACCELERATE)
    (folder / "run.yaml").write_text(run)
    request = Request(
        target="run.yaml",
        overrides=tuple(parse_assignment(text) for text in assignments),
        accelerate_config="acc.yaml",
    )
    return make_plan(
        request, Surroundings(environment={"CUDA_VISIBLE_DEVICES": ""}, working_dir=folder)
    )


def test_an_accelerate_config_fills_what_the_run_file_leaves_open(folder: Path) -> None:
    plan = _with_accelerate(folder, RUN)

    assert (plan.engine.name, plan.engine.compute_dtype) == ("zero2", "bf16")
    assert plan.training["max_grad_norm"] == 0.7
    assert plan.origins["training.max_grad_norm"] == "acc.yaml: deepspeed_config.gradient_clipping"


def test_an_accelerate_config_that_contradicts_the_run_file_is_told_all_at_once(
    folder: Path,
) -> None:
    run = RUN + "  max_grad_norm: 1.0\nengine: fsdp\n"

    with pytest.raises(ConfigError) as raised:
        _with_accelerate(folder, run)

    assert set(raised.value.faults) == {
        "run.yaml:7: training.max_grad_norm: 1.0, but acc.yaml: deepspeed_config.gradient_clipping "
        "says 0.7; leave one out, or settle it by --set training.max_grad_norm=…",
        "run.yaml:8: engine.name: 'fsdp', but acc.yaml: deepspeed_config.zero_stage says 'zero2'; "
        "leave one out, or settle it by --set engine.name=…",
    }
    settled = ("engine.name=zero2", "training.max_grad_norm=0.7")
    assert _with_accelerate(folder, run, *settled).engine.name == "zero2"


def test_an_accelerate_config_settles_engine_auto_and_says_no_out_loud(folder: Path) -> None:
    assert _with_accelerate(folder, RUN + "engine: auto\n").engine.name == "zero2"
    (folder / "no.yaml").write_text("{num_processes: 2, mixed_precision: 'no'}")
    request = Request(
        target="quick.yaml",
        overrides=(parse_assignment("cluster.procs_per_node=2"),),
        accelerate_config="no.yaml",
    )
    surroundings = Surroundings(environment={"CUDA_VISIBLE_DEVICES": ""}, working_dir=folder)
    assert "bf16" not in make_plan(request, surroundings).training

    (folder / "quick.yaml").write_text(RUN + "  bf16: true\n")
    with pytest.raises(ConfigError) as raised:
        make_plan(request, surroundings)
    assert raised.value.faults == (
        "quick.yaml:7: training.bf16: true, but no.yaml: mixed_precision says false; leave one "
        "out, or settle it by --set training.bf16=…",
    )


@pytest.mark.parametrize(
    ("said", "engine"),
    [
        ("engine.shard=1", "fsdp"),
        ("engine.offload_optimizer=cpu", "zero1"),
        ("engine.secondary_shard=2", "zero3"),
        ("engine.forward_prefetch=2", "fsdp"),
        ("training.fsdp_config={reshard_after_forward: false}", "fsdp"),
    ],
)
def test_auto_takes_an_engine_that_has_what_was_said(folder: Path, said: str, engine: str) -> None:
    plan = _make(folder, "cluster.procs_per_node=2", said)

    assert plan.engine.name == engine
    assert plan.topology.shard_size == (1 if "shard=1" in said else 2)
    assert plan.origins["engine.name"].startswith("auto: the fastest that fits")


def test_auto_refuses_what_no_engine_has_with_the_fewest_faults(folder: Path) -> None:
    said = ("engine.shard=2", "engine.offload_optimizer=cpu", "cluster.procs_per_node=2")

    assert _fault(folder, *said, "training.bf16=true", "training.fp16=true").splitlines()[0] == (
        "--set: training.fp16: bf16 and fp16 are both true; keep one of them"
    )


def test_a_deepspeed_json_fills_arguments_and_says_from_where(folder: Path) -> None:
    (folder / "ds.json").write_text(
        json.dumps({"zero_optimization": {"stage": 3}, "gradient_clipping": 0.3})
    )
    plan = _make(folder, f"training.deepspeed={folder}/ds.json")

    assert plan.engine.name == "zero3"
    assert plan.training["max_grad_norm"] == 0.3
    assert plan.origins["training.max_grad_norm"] == f"{folder}/ds.json: gradient_clipping"


def test_a_deepspeed_json_s_options_and_global_batch_are_the_plan_s(folder: Path) -> None:
    zero = {"stage": 3, "zero_hpz_partition_size": 2}
    (folder / "ds.json").write_text(json.dumps({"zero_optimization": zero, "train_batch_size": 24}))
    said = ("cluster.procs_per_node=2", f"training.deepspeed={folder}/ds.json")

    plan = _make(folder, *said)

    assert plan.options.secondary_shard == 2
    key = "zero_optimization.zero_hpz_partition_size"
    assert plan.origins["engine.secondary_shard"] == f"{folder}/ds.json: {key}"
    assert plan.training["gradient_accumulation_steps"] == 3
    assert plan.origins["global_batch_size"] == f"{folder}/ds.json: train_batch_size"
    assert RunPlan.from_json(plan.to_json()) == plan
    assert _fault(folder, *said, "global_batch_size=16") == (
        f"--set: global_batch_size: 16, but {folder}/ds.json: train_batch_size is 24; neither "
        "wins: make them equal, or leave one out"
    )


def test_of_global_batch_micro_batch_and_accumulation_the_one_that_is_unsaid_follows(
    folder: Path,
) -> None:
    without_micro_batch = RUN[: RUN.index("training:")]
    (folder / "quick.yaml").write_text(without_micro_batch)
    given = {
        "zero_optimization": {"stage": 2},
        "train_batch_size": 24,
        "gradient_accumulation_steps": 3,
    }
    (folder / "ds.json").write_text(json.dumps(given))
    said = ("cluster.procs_per_node=2", f"training.deepspeed={folder}/ds.json")

    plan = _make(folder, *said)

    assert plan.training["per_device_train_batch_size"] == 4
    assert plan.origins["training.per_device_train_batch_size"] == "derived"
    fate = next(f for f in plan.fates if f.argument == "per_device_train_batch_size")
    assert (fate.fate, fate.detail) == ("derived", "global_batch_size 24 ÷ (3 × 2 processes)")
    assert _fault(folder, *said, "cluster.procs_per_node=3") == (
        f"{folder}/ds.json: train_batch_size: global_batch_size: 24 is not divisible by 3 "
        "(training.gradient_accumulation_steps) × 3 (processes) = 9; use 18 or 27"
    )


def test_mistakes_of_every_kind_are_told_in_one_report(folder: Path) -> None:
    """Types in the run file and in the JSON, two global batches, a missing file, and what the
    engine can't have; nothing that only follows from one of them."""
    given = {
        "zero_optimization": {"stage": 3, "overlap_com": True, "reduce_bucket_size": "5e8"},
        "train_batch_size": 24,
        "gradient_clipping": 0.3,
        "wall_clock_breakdown": 1,
    }
    (folder / "ds.json").write_text(json.dumps(given))
    (folder / "quick.yaml").write_text(
        RUN.replace("{name: builtin:python-docs,", "{train_files: nowhere.txt, packing: 2,")
        + "  learning_rate: fast\n"
        "  max_grad_norm: 1.0\n"
        "  fp16: true\n"
        f"  deepspeed: {folder}/ds.json\n"
        "global_batch_size: 7\n"
    )

    assert _fault(folder, "cluster.procs_per_node=2").splitlines() == [
        "quick.yaml:4: data.packing: 2 is not true or false",
        f"quick.yaml:4: data.train_files: {folder}/nowhere.txt names no file; {folder} holds 2 "
        "other entries",
        "quick.yaml:7: training.learning_rate: 'fast' is not a number",
        "quick.yaml:9: training.fp16: DeepSpeed has no fp16 on a CPU; use bf16: true, or engine "
        "ddp or fsdp, or a GPU",
        "quick.yaml:10: training.deepspeed: zero_optimization.reduce_bucket_size is '5e8' there, "
        "not a whole number",
        "quick.yaml:10: training.deepspeed: wall_clock_breakdown is 1 there, not true or false",
        "quick.yaml:10: training.deepspeed: zero_optimization.overlap_com is no key of "
        "DeepSpeed's; did you mean 'overlap_comm'?",
        "quick.yaml:10: training.deepspeed: gradient_clipping is 0.3 there, but "
        "training.max_grad_norm is 1.0 (quick.yaml:8); neither wins: make them equal, leave one "
        'out, or say "auto" there',
        "quick.yaml:11: global_batch_size: 7, but quick.yaml:10: train_batch_size is 24; neither "
        "wins: make them equal, or leave one out",
    ]


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ("model.config.hidden_size=wide", "model.config.hidden_size: 'wide' is not a whole number"),
        ("tokenizer=null", "tokenizer: missing; a model from scratch brings none"),
        (
            "training.deepspeed={zero_optimization: {stage: 2}, train_batch_size: -4}",
            "train_batch_size is -4 there; it must be at least 1",
        ),
        (
            "training.deepspeed={zero_optimization: {stage: 2}, train_batch_size: 0}",
            "train_batch_size is 0 there; it must be at least 1",
        ),
        (
            "training.deepspeed={zero_optimization: {stage: 3, zero_hpz_partition_size: 0}}",
            "0 does not divide the 1 ranks",
        ),
    ],
)
def test_values_with_which_nothing_could_be_computed_are_told(
    folder: Path, said: str, told: str
) -> None:
    assert told in _fault(folder, said)
    assert told in _fault(folder, said, "training.learning_rate=fast")


def test_hybrid_sharding_cuts_within_each_node(folder: Path) -> None:
    said = ("cluster.nodes=2", "cluster.procs_per_node=4", "training.fsdp=hybrid_shard")

    topology = _make(folder, *said, is_rehearsal=True).topology

    assert (topology.shard_size, topology.replicate_size) == (4, 2)


def test_nvme_is_for_scripts_of_others(folder: Path) -> None:
    assignments = ("engine.name=zero3", "engine.offload_optimizer=nvme", "engine.nvme_path=/local")

    assert _fault(folder, *assignments) == (
        "engine: a run file's checkpoints can't hold what DeepSpeed keeps on NVMe, so it is "
        "planned and not started: offload all of it to cpu, or use a script with transformers' "
        "Trainer, whose checkpoints are DeepSpeed's own"
    )
    (folder / "train.py").write_text("from transformers import Trainer\n")
    plan = _make(folder, *assignments, target="train.py", is_rehearsal=True)
    told = json.loads(plan.environment["ACCELERATE_DEEPSPEED_CONFIG_FILE"])
    assert told["zero_optimization"]["offload_optimizer"]["device"] == "nvme"
    assert told["zero_optimization"]["offload_optimizer"]["nvme_path"] == "/local"


@pytest.mark.parametrize(
    ("compiler", "why"),
    [
        ("#!/bin/sh\nexit 1\n", "against libaio, which was not found here"),
        (None, "there is no compiler (made-up-c++)"),
    ],
)
def test_a_machine_that_can_not_build_what_nvme_needs_is_told_before_anything_starts(
    folder: Path, compiler: str | None, why: str
) -> None:
    (folder / "train.py").write_text("from transformers import Trainer\n")
    program = folder / "c++"
    if compiler is not None:
        program.write_text(compiler)
        program.chmod(0o755)
    environment = {
        "CUDA_VISIBLE_DEVICES": "",
        "PATH": "/usr/bin:/bin",
        "CXX": str(program) if compiler else "made-up-c++",
    }
    said = ("engine.name=zero3", "engine.offload_optimizer=nvme", "engine.nvme_path=/local")
    said += ("cluster.procs_per_node=1",)
    request = Request(target="train.py", overrides=tuple(parse_assignment(text) for text in said))
    here = Surroundings(environment=environment, working_dir=folder)

    with pytest.raises(UnsupportedError) as raised:
        make_plan(request, here)

    (told,) = raised.value.faults
    assert told.startswith("engine: offload to nvme: DeepSpeed compiles an operator for it")
    assert why in told
    assert "install libaio-dev" in told
    # What other machines have, this one can't tell.
    make_plan(request, dataclasses.replace(here, gpus_of_nodes=lambda cluster: 0))


def test_partial_offload_is_refused_where_its_state_would_not_be_saved(folder: Path) -> None:
    given = {
        "zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu", "ratio": 0.3}}
    }
    (folder / "ds.json").write_text(json.dumps(given))

    assert "can't hold the two optimizers of offload_optimizer.ratio 0.3" in _fault(
        folder, f"training.deepspeed={folder}/ds.json"
    )


def test_what_a_script_with_bigtrain_s_trainer_says_itself_is_refused(folder: Path) -> None:
    (folder / "own.py").write_text("def main():\n    from bigtrain import Trainer\n")

    assert _fault(folder, "training.bf16=true", target="own.py") == (
        "own.py uses bigtrain's Trainer, whose arguments say bf16: give it to the script, after --"
    )
    assert _make(folder, target="own.py").environment == {}


@pytest.mark.parametrize(
    "assignment",
    [
        "model={name: ~nobody-here/x}",
        "data={train_files: [~nobody-here/x]}",
        "output_dir=~nobody-here",
    ],
)
def test_a_home_that_is_not_there_is_one_clear_fault(folder: Path, assignment: str) -> None:
    assert "~nobody-here" in _fault(folder, assignment)
    assert "there is no such home directory" in _fault(folder, assignment)
