"""Configs in transformers' words choose the engine, fill its options, or are refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bigtrain.errors import ConfigError, UnsupportedError
from bigtrain.translate import topology_for, translate
from bigtrain.translate.config import (
    DeepSpeedSettings,
    EngineConfig,
    EngineName,
    EngineOptions,
    FsdpSettings,
)
from bigtrain.translate.foreign import asked_engine, implied


def _config(values: dict[str, Any], engine: EngineName, **more: Any) -> EngineConfig:
    topology = topology_for(engine, procs_per_node=2)
    device = more.pop("device", "cpu")
    return translate(values, engine=engine, topology=topology, device=device, **more).engine


def _faults(values: dict[str, Any], engine: EngineName) -> list[str]:
    with pytest.raises(UnsupportedError) as raised:
        _config(values, engine)
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


def test_what_the_engine_section_says_wins_over_fsdp_config() -> None:
    values = {"fsdp": "full_shard", "fsdp_config": {"cpu_offload": True}}
    options = EngineOptions(cpu_offload=False)

    settings = _config(values, "fsdp", options=options).settings

    assert settings == FsdpSettings(shard_size=2, cpu_offload=False)


def test_fsdp_keys_without_a_counterpart_are_refused_by_name() -> None:
    values = {
        "fsdp": "no_shard",
        "fsdp_config": {"backward_prefetch": "backward_post", "activation_checkpointing": True},
    }

    assert _faults(values, "fsdp") == [
        "training.fsdp: 'no_shard' is not supported; use auto_wrap, full_shard, offload, "
        "shard_grad_op",
        "training.fsdp_config: backward_prefetch: 'backward_post' has no counterpart in FSDP2 "
        "here; leave it out",
        "training.fsdp_config: activation_checkpointing is said by training.gradient_checkpointing "
        "here",
    ]


def test_a_deepspeed_file_is_followed_and_its_autos_resolved(tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    given = {
        "train_batch_size": "auto",
        "gradient_clipping": "auto",
        "bf16": {"enabled": "auto"},
        "zero_optimization": {"stage": 2, "reduce_bucket_size": 12_345, "overlap_comm": "auto"},
        "gradient_predivide_factor": 2.0,
    }
    path.write_text(json.dumps(given))

    settings = _config({"deepspeed": str(path), "bf16": True}, "zero2").settings

    assert isinstance(settings, DeepSpeedSettings)
    assert settings.json["train_batch_size"] == 16
    assert settings.json["gradient_clipping"] == 1.0
    assert settings.json["bf16"]["enabled"] is True
    assert settings.json["zero_optimization"]["reduce_bucket_size"] == 12_345
    assert settings.json["zero_optimization"]["overlap_comm"] is False
    assert settings.json["gradient_predivide_factor"] == 2.0


def test_a_deepspeed_config_that_contradicts_the_arguments_is_refused_whole() -> None:
    given = {
        "zero_optimization": {
            "stage": 3,
            "overlap_com": True,
            "offload_optimizer": {"devise": "cpu"},
        },
        "activation_checkpointing": {"partition_activation": True},
        "fp16": {"loss_scal": 0},
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


def test_hybrid_sharding_of_fsdp1_is_refused_with_the_key_that_says_it() -> None:
    values = {"fsdp": "hybrid_shard", "fsdp_config": {"sharding_strategy": "HYBRID_SHARD"}}

    assert _faults(values, "fsdp") == [
        "training.fsdp: hybrid_shard: say it by engine.shard, the number of ranks that share a "
        "copy",
        "training.fsdp_config: sharding_strategy: HYBRID_SHARD: say it by engine.shard, the ranks "
        "that share a copy",
    ]


def test_parts_of_accelerator_config_that_nobody_reads_are_refused() -> None:
    from accelerate.utils import DataLoaderConfiguration

    assert _faults({"accelerator_config": {"dispatch_batches": True}}, "ddp") == [
        "training.accelerator_config: dispatch_batches: True is not supported; leave it out"
    ]
    live = DataLoaderConfiguration(dispatch_batches=True)
    assert len(_faults({"accelerator_config": live}, "ddp")) == 1
    assert _config({"accelerator_config": {"split_batches": True}}, "ddp").name == "ddp"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            "nowhere.json",
            "nowhere.json can't be read (No such file or directory); give a JSON file",
        ),
        (
            "{",
            "{ is not JSON: Expecting property name enclosed in double quotes: line 1 column 2 "
            "(char 1)",
        ),
    ],
)
def test_a_deepspeed_config_that_can_not_be_read_is_named(given: str, message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        asked_engine({"deepspeed": given})

    assert str(raised.value) == f"training.deepspeed: {message}"


def test_malformed_sections_and_secrets_of_a_deepspeed_config_are_told_at_once() -> None:
    given = {
        "bf16": True,
        "zero_optimization": {"stage": "3"},
        "comet": {"enabled": True, "api_key": "of-mine"},
    }
    with pytest.raises(ConfigError) as raised:
        asked_engine({"deepspeed": given})

    bf16, stage, secret = raised.value.faults
    assert bf16.startswith("training.deepspeed: bf16 is True there; make it a section")
    assert stage == "training.deepspeed: zero_optimization.stage is '3' there, not 0, 1, 2 or 3"
    assert secret.startswith("training.deepspeed: comet.api_key: a secret's value must not be")
    assert "of-mine" not in str(raised.value)
