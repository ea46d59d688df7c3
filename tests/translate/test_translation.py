"""The same arguments, translated for each engine."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from bigtrain.errors import UnsupportedError
from bigtrain.translate import topology_for, translate
from bigtrain.translate.config import (
    ArgumentFate,
    DdpSettings,
    EngineConfig,
    EngineName,
    EngineOptions,
    FsdpSettings,
    SingleSettings,
)


def _config(
    values: dict[str, Any], engine: EngineName, procs: int = 2, **more: Any
) -> EngineConfig:
    topology = topology_for(engine, procs_per_node=procs, shard=more.pop("shard", None))
    return translate(
        values, engine=engine, topology=topology, device=more.pop("device", "cpu"), **more
    ).engine


def _faults(values: dict[str, Any], engine: EngineName, procs: int = 2, **more: Any) -> list[str]:
    with pytest.raises(UnsupportedError) as raised:
        _config(values, engine, procs, **more)
    return list(raised.value.faults)


def test_single_is_told_nothing() -> None:
    assert _config({"bf16": True}, "single", 1) == EngineConfig(
        name="single", settings=SingleSettings(), compute_dtype="bf16"
    )


def test_ddp_takes_its_own_arguments() -> None:
    values = {"ddp_find_unused_parameters": True, "ddp_bucket_cap_mb": 50, "fp16": True}

    assert _config(values, "ddp") == EngineConfig(
        name="ddp",
        settings=DdpSettings(find_unused_parameters=True, bucket_cap_mb=50),
        compute_dtype="fp16",
    )


def test_ddp_arguments_are_mapped_on_ddp_and_without_effect_elsewhere() -> None:
    def fate(engine: EngineName) -> ArgumentFate:
        translation = translate(
            {"ddp_bucket_cap_mb": 50},
            engine=engine,
            topology=topology_for(engine, procs_per_node=2),
            device="cpu",
        )
        return next(f for f in translation.fates if f.argument == "ddp_bucket_cap_mb")

    assert fate("ddp") == ArgumentFate(
        argument="ddp_bucket_cap_mb", fate="mapped", detail="bucket_cap_mb = 50"
    )
    assert fate("fsdp") == ArgumentFate(
        argument="ddp_bucket_cap_mb", fate="no_effect", detail="only ddp reads it"
    )


def test_fsdp_shards_over_all_ranks_unless_told_otherwise() -> None:
    assert _config({}, "fsdp", 4).settings == FsdpSettings(shard_size=4)
    assert _config({}, "fsdp", 4, shard=2).settings == FsdpSettings(shard_size=2)


def test_fsdp_takes_the_engine_section() -> None:
    options = EngineOptions(
        reshard_after_forward=False, cpu_offload=True, wrap_classes=("Block",), master_dtype="bf16"
    )

    assert _config({"bf16": True}, "fsdp", options=options, device="cuda") == EngineConfig(
        name="fsdp",
        settings=FsdpSettings(
            shard_size=2, reshard_after_forward=False, cpu_offload=True, wrap_classes=("Block",)
        ),
        compute_dtype="bf16",
        master_dtype="bf16",
    )


def test_gradients_of_whole_parameters_are_reduced_in_the_parameters_precision() -> None:
    o3 = {"fp16": True, "fp16_opt_level": "O3"}

    assert _config(o3, "ddp", device="cuda").reduce_dtype == "fp16"
    assert _config({**o3, "fp16_opt_level": "O2"}, "ddp", device="cuda").reduce_dtype == "fp32"
    assert _config(o3, "fsdp", device="cuda").reduce_dtype == "fp32"


def test_full_precision_level_of_fp16_is_fp32() -> None:
    assert _config({"fp16": True, "fp16_opt_level": "O0"}, "single", 1).compute_dtype == "fp32"


def test_all_faults_are_told_at_once() -> None:
    values = {"bf16": True, "fp16": True, "ddp_backend": "mpi", "warp_drive": 9}

    faults = _faults(
        values, "single", 2, options=EngineOptions(shard=2), origins={"training.fp16": "run.yaml:9"}
    )

    assert faults == [
        "training.warp_drive: not supported: TrainingArguments has no such field",
        "run.yaml:9: training.fp16: bf16 and fp16 are both true; keep one of them",
        "training.ddp_backend: 'mpi' is not gloo; leave it out",
        "engine.name: engine single runs one process, not 2; use ddp, fsdp or zero1 to zero3, or "
        "one process",
        "engine.shard: single does not shard; leave it out, or use engine fsdp",
    ]


def test_fp16_with_deepspeed_on_a_cpu_is_refused_and_on_a_gpu_taken() -> None:
    assert _faults({"fp16": True}, "zero2") == [
        "training.fp16: DeepSpeed has no fp16 on a CPU; use bf16: true, or engine ddp or fsdp, or "
        "a GPU"
    ]
    assert _config({"fp16": True}, "zero2", device="cuda").compute_dtype == "fp16"


def test_zero_refuses_what_it_does_not_have_here() -> None:
    options = EngineOptions(cpu_offload=True)

    assert _faults({}, "zero3", 4, shard=2, options=options) == [
        "engine.shard: ZeRO shards over all 4 ranks, not 2; leave shard out, or use engine fsdp",
        "engine.cpu_offload: not supported with ZeRO; leave it out, or use engine fsdp",
    ]


def test_what_needs_the_whole_model_is_refused_where_it_is_sharded() -> None:
    assert _faults({"torch_compile": True}, "fsdp") == [
        "training.torch_compile: not supported on fsdp, where no rank has the whole model; leave "
        "it out, or use engine single or ddp"
    ]
    assert _config({"torch_compile": True}, "ddp").name == "ddp"


def test_bf16_masters_need_bf16() -> None:
    assert _faults({}, "fsdp", options=EngineOptions(master_dtype="bf16")) == [
        "training.bf16: engine.master_dtype bf16 needs training.bf16: true; set it, or master fp32"
    ]


@pytest.mark.parametrize("engine", ["ddp", "fsdp", "zero3"])
def test_translating_changes_nothing_that_it_is_given(engine: EngineName) -> None:
    values = {"bf16": True, "report_to": ["tensorboard"], "lr_scheduler_kwargs": {"a": [1]}}
    before = copy.deepcopy(values)

    first = _config(values, engine)

    assert values == before
    assert _config(values, engine) == first
