"""Configs in transformers' words choose the engine, fill its options, or are refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bigtrain.errors import ConfigError, UnsupportedError
from bigtrain.translate import deepspeed_keys, topology_for, translate
from bigtrain.translate.config import (
    DeepSpeedSettings,
    EngineConfig,
    EngineName,
    EngineOptions,
    FsdpSettings,
)
from bigtrain.translate.foreign import (
    asked_engine,
    given_options,
    implied,
    implied_origins,
    shards_by_node,
)
from bigtrain.translate.given_json_fates import is_judged


def _config(values: dict[str, Any], engine: EngineName, **more: Any) -> EngineConfig:
    topology = topology_for(engine, procs_per_node=2)
    device = more.pop("device", "cpu")
    return translate(values, engine=engine, topology=topology, device=device, **more).engine


def _faults(values: dict[str, Any], engine: EngineName, **more: Any) -> list[str]:
    with pytest.raises(UnsupportedError) as raised:
        _config(values, engine, **more)
    return list(raised.value.faults)


@pytest.mark.parametrize(
    ("values", "engine"),
    [
        ({}, None),
        ({"fsdp": "full_shard auto_wrap"}, "fsdp"),
        ({"fsdp": True}, "fsdp"),
        ({"deepspeed": {"zero_optimization": {"stage": 2}}}, "zero2"),
        ({"deepspeed": '{"zero_optimization": {"stage": 3}}'}, "zero3"),
        ({"deepspeed": {"train_batch_size": 8}}, "ddp"),
    ],
)
def test_the_arguments_ask_for_an_engine(values: dict[str, Any], engine: str | None) -> None:
    assert asked_engine(values) == engine


def test_fsdp_words_and_config_become_options() -> None:
    values = {
        "fsdp": "shard_grad_op auto_wrap offload",
        "fsdp_config": {
            "fsdp_transformer_layer_cls_to_wrap": "A,B",
            "fsdp_use_orig_params": "true",
        },
    }

    assert _config(values, "fsdp", device="cuda").settings == FsdpSettings(
        shard_size=2, reshard_after_forward=False, cpu_offload=True, wrap_classes=("A", "B")
    )


def test_what_fsdp_config_and_the_engine_section_both_say_must_agree() -> None:
    values = {"fsdp": "full_shard offload", "fsdp_config": {"fsdp_reshard_after_forward": False}}
    options = EngineOptions(cpu_offload=False, reshard_after_forward=True)
    origins = {"engine.cpu_offload": "run.yaml:9"}

    assert _faults(values, "fsdp", options=options, origins=origins) == [
        "training.fsdp: offload is said there, but engine.cpu_offload is false (run.yaml:9); "
        "neither wins: make them equal, or leave one out",
        "training.fsdp_config: reshard_after_forward is false there, but "
        "engine.reshard_after_forward is true; neither wins: make them equal, or leave one out",
    ]
    same = EngineOptions(cpu_offload=True, reshard_after_forward=False)
    assert _config(values, "fsdp", options=same, device="cuda").settings == FsdpSettings(
        shard_size=2, reshard_after_forward=False, cpu_offload=True
    )


def test_fsdp_config_is_read_by_fsdp_alone_and_refused_elsewhere() -> None:
    values = {"fsdp_config": {"reshard_after_forward": False}}

    assert _config(values, "fsdp").settings == FsdpSettings(
        shard_size=2, reshard_after_forward=False
    )
    assert _faults(values, "ddp") == [
        "training.fsdp_config: the engine is ddp, and only fsdp reads it; set fsdp: full_shard, "
        "or leave it out",
        "engine.reshard_after_forward: ddp does not shard; leave it out, or use engine fsdp",
    ]


def test_words_of_fsdp_that_contradict_its_config_are_told() -> None:
    values = {"fsdp": "shard_grad_op", "fsdp_config": {"sharding_strategy": "FULL_SHARD"}}

    assert _faults(values, "fsdp") == [
        "training.fsdp_config: sharding_strategy is FULL_SHARD there, but fsdp's shard_grad_op is "
        "said; neither wins: leave one out"
    ]


def test_fsdp_keys_without_a_counterpart_are_refused_by_name() -> None:
    values = {
        "fsdp": "no_shard",
        "fsdp_config": {"backward_prefetch": "backward_post", "activation_checkpointing": True},
    }

    assert _faults(values, "fsdp") == [
        "training.fsdp: 'no_shard' is not supported; use auto_wrap, full_shard, "
        "hybrid_shard, hybrid_shard_zero2, offload, shard_grad_op",
        "training.fsdp_config: backward_prefetch: 'backward_post' has no counterpart in FSDP2 "
        "here; leave it out",
    ]


@pytest.mark.parametrize(
    ("names", "classes"),
    [
        ("LlamaDecoderLayer, LlamaMLP", ("LlamaDecoderLayer", "LlamaMLP")),
        ("", ()),
        ([" A", ""], ("A",)),
    ],
)
def test_class_names_are_read_without_what_is_around_them(
    names: Any, classes: tuple[str, ...]
) -> None:
    values = {"fsdp": True, "fsdp_config": {"transformer_layer_cls_to_wrap": names}}

    assert _config(values, "fsdp").settings == FsdpSettings(shard_size=2, wrap_classes=classes)


def test_fsdp_is_spelled_in_all_ways_that_transformers_takes() -> None:
    config = {
        "version": "2",
        "fsdp_min_num_params": "0",
        "auto_wrap_policy": "transformer_based_wrap",
        "activation_checkpointing": "true",
    }
    for said in (True, "full_shard", ["full_shard", "auto_wrap"]):
        settings = _config({"fsdp": said, "fsdp_config": config}, "fsdp").settings
        assert settings == FsdpSettings(shard_size=2)
    assert asked_engine({"fsdp": False}) is None


def test_recomputation_by_fsdp_s_config_is_the_argument_s() -> None:
    values = {"fsdp": True, "fsdp_config": {"fsdp_activation_checkpointing": True}}
    refused = {**values, "gradient_checkpointing": False}

    assert implied(values) == {"gradient_checkpointing": (True, "activation_checkpointing")}
    assert implied({**values, "activation_checkpointing": True}) == {}
    assert _faults(refused, "fsdp", origins={"training.gradient_checkpointing": "run.yaml:4"}) == [
        "training.fsdp_config: activation_checkpointing is true there, but "
        "training.gradient_checkpointing is false (run.yaml:4); neither wins: leave one out"
    ]


@pytest.mark.parametrize(
    ("word", "strategy"), [("hybrid_shard", "FULL_SHARD"), ("full_shard", "HYBRID_SHARD")]
)
def test_hybrid_sharding_in_one_place_only_is_told(word: str, strategy: str) -> None:
    values = {"fsdp": word, "fsdp_config": {"sharding_strategy": strategy}}

    assert _faults(values, "fsdp") == [
        f"training.fsdp_config: sharding_strategy is {strategy} there, but fsdp's {word} is said; "
        "neither wins: leave one out"
    ]


def test_a_deepspeed_file_is_followed_and_its_autos_resolved(tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    given = {
        "train_batch_size": "auto",
        "gradient_clipping": "auto",
        "bf16": {"enabled": "auto"},
        "zero_optimization": {"stage": 2, "reduce_bucket_size": 12_345, "overlap_comm": "auto"},
        "memory_breakdown": True,
    }
    path.write_text(json.dumps(given))

    settings = _config({"deepspeed": str(path), "bf16": True}, "zero2").settings

    assert isinstance(settings, DeepSpeedSettings)
    assert settings.json["train_batch_size"] == 16
    assert settings.json["gradient_clipping"] == 1.0
    assert settings.json["bf16"]["enabled"] is True
    assert settings.json["zero_optimization"]["reduce_bucket_size"] == 12_345
    assert settings.json["zero_optimization"]["overlap_comm"] is False
    assert settings.json["memory_breakdown"] is True


def test_a_deepspeed_config_that_contradicts_the_arguments_is_refused_whole() -> None:
    given = {
        "zero_optimization": {
            "stage": 3,
            "overlap_com": True,
            "offload_optimizer": {"devise": "cpu"},
        },
        "activation_checkpointing": {"partition_activation": True},
        "fp16": {"loss_scal": 0},
        "data_types": {"grad_acum_dtype": "fp32"},
        "flops_profiler": {"enabeld": True},
        "wandb": {"projekt": "x"},
        "optimizer": {"type": "OneBitAdam", "params": {"lr": 3e-4, "freeze_step": 4}},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 10}},
        "gradient_clippping": 2.0,
        "gradient_clipping": 2.0,
    }

    assert _faults({"deepspeed": given, "fsdp": "full_shard"}, "zero2") == [
        "training.deepspeed: it asks for engine zero3, but the run's engine is zero2; "
        "neither wins: leave one out",
        "training.fsdp: fsdp and deepspeed are both set; keep one of them",
        "training.deepspeed: zero_optimization.overlap_com is no key of DeepSpeed's; did you mean "
        "'overlap_comm'?",
        "training.deepspeed: zero_optimization.offload_optimizer.devise is no key of DeepSpeed's; "
        "did you mean 'device'?",
        "training.deepspeed: activation_checkpointing.partition_activation is no key of "
        "DeepSpeed's; did you mean 'partition_activations'?",
        "training.deepspeed: fp16.loss_scal is no key of DeepSpeed's; did you mean 'loss_scale'?",
        "training.deepspeed: data_types.grad_acum_dtype is no key of DeepSpeed's; did you mean "
        "'grad_accum_dtype'?",
        "training.deepspeed: flops_profiler.enabeld is no key of DeepSpeed's; did you mean "
        "'enabled'?",
        "training.deepspeed: wandb.projekt is no key of DeepSpeed's; did you mean 'project'?",
        "training.deepspeed: gradient_clippping is no key of DeepSpeed's; did you mean "
        "'gradient_clipping'?",
        "training.deepspeed: optimizer.type is 'OneBitAdam', but the loop makes the optimizer; "
        "leave it out and set training.optim and its hyperparameters",
        "training.deepspeed: optimizer.params.freeze_step has no counterpart in "
        "TrainingArguments; leave it out",
        "training.deepspeed: scheduler.type is 'WarmupLR', but training.lr_scheduler_type is "
        "linear; the loop makes the schedule: leave scheduler out, or set lr_scheduler_type as "
        "constant_with_warmup",
        "training.deepspeed: scheduler.params (warmup_num_steps) belong to the loop; say them by "
        "training.warmup_steps and learning_rate",
        "training.deepspeed: gradient_clipping is 2.0 there, but training.max_grad_norm is 1.0 "
        '(its default); neither wins: make them equal, leave one out, or say "auto" there',
        "training.deepspeed: optimizer.params.lr is 0.0003 there, but training.learning_rate is "
        '5e-05 (its default); neither wins: make them equal, leave one out, or say "auto" there',
    ]


def test_a_usual_deepspeed_file_with_offload_and_autos_is_followed() -> None:
    given = {
        "bf16": {"enabled": "auto"},
        "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": "auto"}},
        "scheduler": {"type": "WarmupDecayLR", "params": {"total_num_steps": "auto"}},
        "zero_optimization": {
            "stage": 3,
            "offload_optimizer": {"device": "cpu", "pin_memory": True},
            "stage3_prefetch_bucket_size": "auto",
            "stage3_gather_16bit_weights_on_model_save": True,
        },
        "train_micro_batch_size_per_gpu": 4,
        "wall_clock_breakdown": False,
    }
    values = {"deepspeed": given, "bf16": True}
    filled = {field: value for field, (value, _) in implied(values).items()}

    settings = _config(values | filled, "zero3").settings

    assert filled == {"per_device_train_batch_size": 4}
    assert isinstance(settings, DeepSpeedSettings)
    assert settings.json["train_batch_size"] == 8
    assert settings.json["zero_optimization"]["offload_optimizer"]["device"] == "cpu"
    assert '"auto"' not in json.dumps(settings.json)
    assert "optimizer" not in settings.json


def test_an_auto_that_nothing_gives_a_value_for_is_refused() -> None:
    given = {"zero_optimization": {"stage": 2}, "data_efficiency": {"seed": "auto"}}

    assert _faults({"deepspeed": given}, "zero2") == [
        'training.deepspeed: data_efficiency.seed is "auto" there, and bigtrain has no value for '
        "it; say one"
    ]


@pytest.mark.parametrize(
    ("config", "settings"),
    [
        ({"sharding_strategy": "FULL_SHARD"}, FsdpSettings(shard_size=2)),
        (
            {"fsdp_sharding_strategy": 2, "fsdp_offload_params": True},
            FsdpSettings(shard_size=2, reshard_after_forward=False, cpu_offload=True),
        ),
        (
            {"fsdp_forward_prefetch": True, "fsdp_state_dict_type": "SHARDED_STATE_DICT"},
            FsdpSettings(shard_size=2, forward_prefetch=1),
        ),
    ],
)
def test_keys_of_fsdp1_become_those_of_fsdp2(
    config: dict[str, Any], settings: FsdpSettings
) -> None:
    values = {"fsdp": "full_shard", "fsdp_config": config}

    assert _config(values, "fsdp", device="cuda").settings == settings


@pytest.mark.parametrize(
    ("values", "reshard"),
    [
        ({"fsdp": "hybrid_shard auto_wrap"}, True),
        ({"fsdp": "hybrid_shard_zero2"}, False),
        ({"fsdp": True, "fsdp_config": {"fsdp_sharding_strategy": "HYBRID_SHARD"}}, True),
        ({"fsdp": True, "fsdp_config": {"sharding_strategy": 5}}, False),
    ],
)
def test_hybrid_sharding_of_fsdp1_is_shard_within_a_node_and_replicas_over_nodes(
    values: dict[str, Any], reshard: bool
) -> None:
    assert shards_by_node(values)
    topology = topology_for("fsdp", nodes=2, procs_per_node=4, shard=4)
    config = translate(values, engine="fsdp", topology=topology, device="cpu").engine
    assert config.settings == FsdpSettings(shard_size=4, reshard_after_forward=reshard)

    with pytest.raises(UnsupportedError, match="cuts over the 4 processes of a node, but the shar"):
        translate(
            values,
            engine="fsdp",
            topology=topology_for("fsdp", nodes=2, procs_per_node=4),
            device="cpu",
        )


_OFFLOADS: dict[str, Any] = {
    "communication_data_type": "bf16",
    "bf16": {"enabled": True, "bf16_master_weights_and_grads": False},
    "zero_optimization": {
        "stage": 3,
        "offload_optimizer": {"device": "cpu", "ratio": 0.5},
        "offload_param": {"device": "nvme", "nvme_path": "/local", "buffer_count": "auto"},
        "zero_hpz_partition_size": 2,
        "zero_quantized_weights": True,
        "zero_quantized_gradients": False,
    },
}


def test_a_deepspeed_file_is_read_into_engine_options() -> None:
    found = {
        said.option: (said.value, said.key) for said in given_options({"deepspeed": _OFFLOADS})
    }
    config = _config({"deepspeed": _OFFLOADS, "bf16": True}, "zero3", device="cuda")

    assert found == {
        "reduce_dtype": ("bf16", "communication_data_type"),
        "master_dtype": ("fp32", "bf16.bf16_master_weights_and_grads"),
        "offload_optimizer": ("cpu", "zero_optimization.offload_optimizer.device"),
        "offload_parameters": ("nvme", "zero_optimization.offload_param.device"),
        "nvme_path": ("/local", "zero_optimization.offload_param.nvme_path"),
        "secondary_shard": (2, "zero_optimization.zero_hpz_partition_size"),
        "quantized_weights": (True, "zero_optimization.zero_quantized_weights"),
        "quantized_gradients": (False, "zero_optimization.zero_quantized_gradients"),
    }
    assert (config.reduce_dtype, config.master_dtype) == ("bf16", "fp32")
    assert isinstance(config.settings, DeepSpeedSettings)
    zero = config.settings.json["zero_optimization"]
    assert zero["offload_optimizer"]["ratio"] == 0.5
    assert zero["offload_param"]["buffer_count"] == 5
    assert config.settings.json["data_types"] == {"grad_accum_dtype": "fp32"}
    assert config.settings.json["aio"]["block_size"] == 1_048_576


def test_every_contradiction_of_a_deepspeed_file_and_the_engine_section_is_told() -> None:
    given = {
        "communication_data_type": "fp16",
        "bf16": {"bf16_master_weights_and_grads": False, "bf16_optimizer_states": False},
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_optimization": {
            "stage": 3,
            "offload_optimizer": {"device": "none", "pin_memory": "auto"},
            "zero_hpz_partition_size": 1,
        },
        "activation_checkpointing": {"cpu_checkpointing": True, "profile": False},
        "tensor_parallel": {"autotp_size": 2},
    }
    options = EngineOptions(
        reduce_dtype="bf16", master_dtype="bf16", offload_optimizer="cpu", secondary_shard=2
    )
    origins = {"engine.offload_optimizer": "run.yaml:9", "engine.reduce_dtype": "--set"}
    neither = "neither wins: make them equal, or leave one out"

    found = _faults(
        {"deepspeed": given, "bf16": True}, "zero3", options=options, origins=origins, device="cuda"
    )

    assert found == [
        "training.deepspeed: activation_checkpointing.cpu_checkpointing is true there, but only a "
        "model that calls deepspeed.checkpointing itself reads it; leave it out, and recompute by "
        "training.gradient_checkpointing",
        "training.deepspeed: tensor_parallel is set there, but only data parallelism is supported; "
        "leave it out",
        "training.deepspeed: data_types.grad_accum_dtype is fp32 there, but gradients accumulate "
        "in the masters' precision, bf16; leave it out, or set engine.master_dtype",
        "training.deepspeed: bf16.bf16_optimizer_states is false there, but the optimizer's state "
        "is in the masters' precision, bf16; leave it out, or set engine.master_dtype",
        "training.deepspeed: communication_data_type is fp16 there, but engine.reduce_dtype is "
        f"bf16 (--set); {neither}",
        "training.deepspeed: bf16.bf16_master_weights_and_grads is false there, but "
        f"engine.master_dtype is bf16; {neither}",
        "training.deepspeed: zero_optimization.offload_optimizer.device is none there, but "
        f"engine.offload_optimizer is cpu (run.yaml:9); {neither}",
        "training.deepspeed: zero_optimization.zero_hpz_partition_size is 1 there, but "
        f"engine.secondary_shard is 2; {neither}",
        "engine.master_dtype: bf16 with an offloaded optimizer needs DeepSpeed's own Adam, and the "
        "loop hands in torch's; leave one out",
    ]


def test_a_part_that_a_deepspeed_file_does_not_offload_is_not_emitted() -> None:
    section = {"stage": 2, "offload_optimizer": {"device": "none", "nvme_path": "auto"}}

    settings = _config({"deepspeed": {"zero_optimization": section}}, "zero2").settings

    assert isinstance(settings, DeepSpeedSettings)
    assert "offload_optimizer" not in settings.json["zero_optimization"]


def test_a_global_batch_in_a_deepspeed_file_must_be_the_run_s() -> None:
    given = {"train_batch_size": 32, "zero_optimization": {"stage": 1}}
    values = {"deepspeed": given, "per_device_train_batch_size": 4}

    settings = _config(values | {"gradient_accumulation_steps": 4}, "zero1").settings
    assert isinstance(settings, DeepSpeedSettings)
    assert settings.json["train_batch_size"] == 32
    assert _faults(values | {"gradient_accumulation_steps": 2}, "zero1") == [
        "training.deepspeed: train_batch_size is 32 there, but 4 (per_device_train_batch_size) × 2 "
        "(gradient_accumulation_steps) × 2 processes are 16; neither wins: make them equal, or say "
        '"auto" there'
    ]


def test_what_the_loop_does_not_run_is_refused_by_name() -> None:
    given = {
        "zero_optimization": {
            "stage": 2,
            "offload_optimizer": {"device": "cpu", "ratio": 0.5, "super_offload": True},
            "mics_shard_size": 2,
        },
        "compression_training": {"weight_quantization": {}},
        "data_efficiency": {
            "enabled": True,
            "data_sampling": {"enabled": True, "num_epoch": 2},
            "data_routing": {"random_ltd": {}, "random_tld": {}},
        },
        "autotuning": {"enabled": True, "fsat": True},
        "hybrid_engine": {"enabled": True, "max_out_token": 512},
        "compile": {"deepcompile": True},
        "torch_autocast": {"enabled": True},
        "data_sampling": {},
    }

    told = [
        fault.removeprefix("training.deepspeed: ")
        for fault in _faults({"deepspeed": given, "bf16": True}, "zero2", device="cuda")
    ]

    tuned = "DeepSpeed's own launcher tunes, not a training"
    assert told == [
        "zero_optimization.mics_shard_size: DeepSpeed has this no more, and refuses it; leave it "
        "out",
        "compression_training: DeepSpeed has this no more, and refuses it; leave it out",
        "data_efficiency.data_sampling.num_epoch is no key of DeepSpeed's; did you mean "
        "'num_epochs'?",
        "data_efficiency.data_routing.random_tld is no key of DeepSpeed's; did you mean "
        "'random_ltd'?",
        "autotuning.fsat is no key of DeepSpeed's; did you mean 'fast'?",
        "hybrid_engine.max_out_token is no key of DeepSpeed's; did you mean 'max_out_tokens'?",
        "data_sampling is no key of DeepSpeed's",
        "data_efficiency.enabled is true there, but the loop loads the data itself; leave it out",
        "data_efficiency.data_sampling.enabled is true there, but the loop loads the data itself; "
        "leave it out",
        "hybrid_engine.enabled is true there, but it is DeepSpeed's for generation; leave it out",
        f"autotuning.enabled is true there, but {tuned}; leave it out, and see bigtrain plan "
        "--compare",
        "compile.deepcompile is true there, but the loop never calls engine.compile; leave it out",
        "torch_autocast.enabled is true there, but training.bf16 and fp16 say what computes in "
        "which precision; leave it out",
        "zero_optimization.offload_optimizer.super_offload is true there, but checkpoints here do "
        "not know it; leave it out",
        "zero_optimization.offload_optimizer.ratio is 0.5 there, but only stage 3 can offload a "
        "part, and the stage is 2; make it 1.0, or the stage 3",
    ]


_NOT_TAKEN: list[tuple[dict[str, Any], str]] = [
    ({"gradient_allreduce_op": "sum"}, "gradient_allreduce_op is sum there, but the loop divides"),
    ({"prescale_gradients": True}, "prescale_gradients is true there, but stage 2 scatters"),
    ({"gradient_predivide_factor": 2}, "gradient_predivide_factor is 2 there, but stage 2 scatter"),
    ({"sequence_parallel_size": 2}, "sequence_parallel_size is 2 there, but only data parallelism"),
    ({"pipeline": {"stages": 2}}, "pipeline is set there, but only data parallelism"),
    ({"bfloat16": {}}, "bfloat16 is set there, but it is an older name; say bf16"),
    (
        {"checkpoint": {"tag_validation": "x"}},
        "checkpoint.tag_validation is x there, but DeepSpeed",
    ),
    ({"torch_autocast": {"dtype": "x"}}, "torch_autocast.dtype is x there, but DeepSpeed takes"),
    ({"data_types": {"buffer_dtype": "x"}}, "data_types.buffer_dtype is x there, but DeepSpeed"),
    ({"data_types": {"grad_accum_dtype": "x"}}, "data_types.grad_accum_dtype is x there, but Deep"),
    (
        {"data_types": {"grad_accum_dtype": "half"}},
        "data_types.grad_accum_dtype is half there, but",
    ),
    (
        {"zero_optimization.legacy_stage1": True},
        "zero_optimization.legacy_stage1 is true there, but",
    ),
    (
        {"zero_optimization.elastic_checkpoint": True},
        "zero_optimization.elastic_checkpoint is true",
    ),
    (
        {"zero_optimization.allgather_bucket_size": 7},
        "zero_optimization.allgather_bucket_size is 7 ",
    ),
    (
        {"zero_optimization.compute_grad_norm": False},
        "zero_optimization.compute_grad_norm is false there, but training.max_grad_norm 1.0 clips",
    ),
    (
        {
            "zero_optimization.stage": 3,
            "zero_optimization.zero_quantized_nontrainable_weights": True,
        },
        "zero_optimization.zero_quantized_nontrainable_weights is true there, but checkpoints here",
    ),
    (
        {"optimizer": {"type": "Adam", "params": {"adam_w_mode": False}}},
        "optimizer.params.adam_w_mode is false there, but the loop makes AdamW",
    ),
]


@pytest.mark.parametrize(("given", "why"), _NOT_TAKEN)
def test_what_deepspeed_refuses_or_does_otherwise_than_the_loop_is_refused_by_name(
    given: dict[str, Any], why: str
) -> None:
    (told,) = _faults(
        {"deepspeed": _nested({"zero_optimization.stage": 2, **given})}, _stage(given)
    )

    assert told.startswith(f"training.deepspeed: {why}")


def _stage(given: dict[str, Any]) -> EngineName:
    return "zero3" if given.get("zero_optimization.stage") == 3 else "zero2"


def _nested(given: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for path, value in given.items():
        section, _, key = path.rpartition(".")
        (found.setdefault(section, {}) if section else found)[key] = value
    return found


@pytest.mark.parametrize(
    "given",
    [
        {"sequence_parallel_size": 1, "tensor_parallel": {}},
        {"gradient_allreduce_op": "MEAN", "optimizer": None, "scheduler": None},
        {"data_types": {"grad_accum_dtype": "float32", "keep_in_fp32_modules": ["norm"]}},
        {"data_types": {"keep_in_fp32_modules": "auto"}},
        {"zero_optimization.reduce_scatter": False, "prescale_gradients": True},
        {"zero_optimization.compute_grad_norm": False, "gradient_clipping": 0.0},
        {"optimizer": {"type": "adam", "params": {"adam_w_mode": True, "torch_adam": True}}},
    ],
)
def test_what_deepspeed_and_the_loop_agree_on_is_taken(given: dict[str, Any]) -> None:
    values = {"deepspeed": _nested({"zero_optimization.stage": 2, **given})}
    filled = {field: value for field, (value, _) in implied(values).items()}

    assert _config(values | filled, "zero2").name == "zero2"


def test_an_optimizer_of_a_deepspeed_file_must_be_the_run_s() -> None:
    given = {"zero_optimization": {"stage": 2}, "optimizer": {"type": "AdamW"}}
    values = {"deepspeed": given, "optim": "sgd"}

    assert _faults(values, "zero2", origins={"training.optim": "run.yaml:7"}) == [
        "training.deepspeed: optimizer.type is AdamW there, but training.optim is sgd "
        "(run.yaml:7); neither wins: make it adamw_torch, or leave one out"
    ]


def test_every_key_that_deepspeed_has_is_judged() -> None:
    assert [key for key in sorted(deepspeed_keys.every_key()) if not is_judged(key)] == []


def test_a_key_that_only_a_newer_deepspeed_has_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    known = {section: dict(keys) for section, keys in deepspeed_keys.known_keys().items()}
    known[""]["wonder"] = frozenset()
    monkeypatch.setattr(deepspeed_keys, "known_keys", lambda: known)

    assert _faults({"deepspeed": {"zero_optimization": {"stage": 2}, "wonder": 1}}, "zero2") == [
        "training.deepspeed: wonder: the installed DeepSpeed has it, and bigtrain not yet; leave "
        "it out"
    ]


def test_what_is_there_but_off_is_named_as_without_effect() -> None:
    given = {
        "zero_optimization": {"stage": 3, "stage3_gather_16bit_weights_on_model_save": True},
        "hybrid_engine": {"enabled": False},
        "checkpoint": {"tag_validation": "Warn"},
    }

    fates = translate(
        {"deepspeed": given}, engine="zero3", topology=topology_for("zero3"), device="cpu"
    ).fates

    fate = next(fate for fate in fates if fate.argument == "deepspeed")
    assert (fate.fate, fate.detail) == (
        "derived",
        "which engine runs, and its options; without effect in it: checkpoint (checkpoints are "
        "written by bigtrain); hybrid_engine (it is not enabled); "
        "zero_optimization.stage3_gather_16bit_weights_on_model_save (export goes tensor by "
        "tensor)",
    )


def test_a_number_beyond_what_deepspeed_takes_is_refused() -> None:
    section = {"stage": 3, "reduce_bucket_size": 0, "offload_optimizer": {"ratio": 1.5}}

    with pytest.raises(ConfigError) as raised:
        asked_engine({"deepspeed": {"zero_optimization": section}})

    assert list(raised.value.faults) == [
        "training.deepspeed: zero_optimization.reduce_bucket_size is 0 there; it must be more than "
        "0",
        "training.deepspeed: zero_optimization.offload_optimizer.ratio is 1.5 there; it must be at "
        "most 1.0",
    ]


def test_numbers_that_are_none_are_refused_and_null_says_nothing() -> None:
    text = """{"zero_optimization": {"stage": 3, "reduce_bucket_size": Infinity,
        "sub_group_size": null}, "fp16": {"enabled": null, "loss_scale": NaN}}"""

    with pytest.raises(ConfigError) as raised:
        asked_engine({"deepspeed": text})
    assert list(raised.value.faults) == [
        "training.deepspeed: zero_optimization.reduce_bucket_size is inf there, not a finite "
        "number",
        "training.deepspeed: fp16.loss_scale is nan there, not a finite number",
    ]
    sound = text.replace("Infinity", "null").replace("NaN", "null")
    settings = _config({"deepspeed": sound}, "zero3").settings
    assert (
        settings == _config({"deepspeed": '{"zero_optimization": {"stage": 3}}'}, "zero3").settings
    )


def test_parts_of_accelerator_config_that_nobody_reads_are_refused() -> None:
    from accelerate.utils import DataLoaderConfiguration

    assert _faults({"accelerator_config": {"dispatch_batches": True}}, "ddp") == [
        "training.accelerator_config: dispatch_batches: True is not supported; leave it out"
    ]
    assert _faults({"accelerator_config": {"split_batch": True}}, "ddp") == [
        "training.accelerator_config: split_batch is no key of it; did you mean 'split_batches'?"
    ]
    live = DataLoaderConfiguration(dispatch_batches=True)
    assert len(_faults({"accelerator_config": live}, "ddp")) == 1
    assert _config({"accelerator_config": {"split_batches": True}}, "ddp").name == "ddp"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("nowhere.json", "nowhere.json: can't be read: No such file or directory"),
        ("/dev/zero", "/dev/zero: can't be read: not a regular file"),
        (
            "{",
            "{ is not JSON: Expecting property name enclosed in double quotes: line 1 column 2 "
            "(char 1)",
        ),
        (
            '{"bf16": {}, "zero_optimization": {"stage": 2, "stage": 3}}',
            "stage: said twice there; keep one",
        ),
        ("a\0b", "a\0b: can't be read: embedded null byte"),
    ],
)
def test_a_deepspeed_config_that_can_not_be_read_is_named(given: str, message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        asked_engine({"deepspeed": given})

    assert str(raised.value) == f"training.deepspeed: {message}"


def test_what_was_not_said_in_a_file_is_where_it_was_written() -> None:
    origins = {"training.fsdp": "run.yaml:5", "training.deepspeed": "--set"}
    text = '{"zero_optimization": {"stage": 2}, "bf16": {"enabled": false}}'

    assert implied_origins({"fsdp": "full_shard offload"}, origins) == {
        "engine.cpu_offload": "run.yaml:5: offload"
    }
    assert implied_origins({"deepspeed": text}, origins) == {"training.bf16": "--set: bf16.enabled"}
    assert _faults({"deepspeed": text, "bf16": True}, "zero2") == [
        "training.deepspeed: bf16.enabled is false there, but training.bf16 is true (its default); "
        'neither wins: make them equal, leave one out, or say "auto" there'
    ]


def test_malformed_sections_and_secrets_of_a_deepspeed_config_are_told_at_once() -> None:
    given = {
        "bf16": True,
        "zero_optimization": {"stage": "3", "offload_param": "cpu", "reduce_bucket_size": "5e8"},
        "comet": {"enabled": True, "api_key": "of-mine"},
        "gradient_accumulation_steps": "4",
        "train_micro_batch_size_per_gpu": 0,
        "optimizer": {"type": "AdamW", "params": {"lr": "1e-4"}},
        "flops_profiler": {"enabled": 1},
        "fp16": {"min_loss_scale": 0},
        "data_types": {"keep_in_fp32_modules": "norm"},
    }
    given["optimizer"]["params"]["betas"] = [0.9]
    with pytest.raises(ConfigError) as raised:
        asked_engine({"deepspeed": given})

    bf16, part, stage, *mistyped, secret = raised.value.faults
    assert part == (
        "training.deepspeed: zero_optimization.offload_param is 'cpu' there, not a section"
    )
    assert mistyped == [
        "training.deepspeed: zero_optimization.reduce_bucket_size is '5e8' there, not a whole "
        "number",
        "training.deepspeed: gradient_accumulation_steps is '4' there, not a whole number",
        "training.deepspeed: flops_profiler.enabled is 1 there, not true or false",
        "training.deepspeed: fp16.min_loss_scale is 0 there; it must be more than 0",
        "training.deepspeed: data_types.keep_in_fp32_modules is 'norm' there, not a list",
        "training.deepspeed: optimizer.params.betas is [0.9] there, not two numbers",
        "training.deepspeed: train_micro_batch_size_per_gpu: 0 is too small; it must be at least 1",
        "training.deepspeed: optimizer.params.lr is '1e-4' there, not a number",
    ]
    assert bf16.startswith("training.deepspeed: bf16 is True there; make it a section")
    assert stage == "training.deepspeed: zero_optimization.stage is '3' there, not 0, 1, 2 or 3"
    assert secret.startswith("training.deepspeed: comet.api_key: a secret's value must not be")
    assert "of-mine" not in str(raised.value)
