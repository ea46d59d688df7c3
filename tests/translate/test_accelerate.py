"""accelerate's config files in, accelerate's variables out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bigtrain.errors import ConfigError
from bigtrain.layers import Override
from bigtrain.planning import Request, Surroundings, make_plan
from bigtrain.translate import accelerate_environment, topology_for, translate
from bigtrain.translate.accelerate_config import overrides
from bigtrain.translate.config import EngineName, EngineOptions


def _said(content: dict[str, Any]) -> dict[str, tuple[Any, str]]:
    found = overrides(content, label="acc.yaml")
    return {override.key: (override.value, override.origin) for override in found}


def test_a_deepspeed_config_becomes_engine_cluster_and_precision() -> None:
    content = {
        "compute_environment": "LOCAL_MACHINE",
        "distributed_type": "DEEPSPEED",
        "num_machines": 2,
        "num_processes": 16,
        "machine_rank": 0,
        "mixed_precision": "bf16",
        "deepspeed_config": {
            "zero_stage": 3,
            "gradient_clipping": 1.0,
            "gradient_accumulation_steps": 4,
            "offload_optimizer_device": "cpu",
            "offload_param_device": "none",
            "zero3_init_flag": True,
        },
    }

    assert _said(content) == {
        "cluster.nodes": (2, "acc.yaml: num_machines"),
        "cluster.procs_per_node": (8, "acc.yaml: num_processes"),
        "training.bf16": (True, "acc.yaml: mixed_precision"),
        "engine.name": ("zero3", "acc.yaml: deepspeed_config.zero_stage"),
        "training.gradient_accumulation_steps": (
            4,
            "acc.yaml: deepspeed_config.gradient_accumulation_steps",
        ),
        "training.max_grad_norm": (1.0, "acc.yaml: deepspeed_config.gradient_clipping"),
        "engine.offload_optimizer": ("cpu", "acc.yaml: deepspeed_config.offload_optimizer_device"),
    }


def test_an_fsdp_config_is_handed_on_and_recomputation_taken_out() -> None:
    said = _said(
        {
            "distributed_type": "FSDP",
            "num_processes": 4,
            "fsdp_config": {
                "fsdp_version": 2,
                "fsdp_reshard_after_forward": True,
                "fsdp_activation_checkpointing": True,
            },
        }
    )

    assert said["engine.name"][0] == "fsdp"
    assert said["training.gradient_checkpointing"][0] is True
    assert said["training.fsdp_config"][0] == {
        "fsdp_version": 2,
        "fsdp_reshard_after_forward": True,
    }


@pytest.mark.parametrize(
    "content",
    [
        {"distributed_type": "no"},
        {"distributed_type": False, "dynamo_backend": "NO"},
        {"dynamo_config": {"dynamo_backend": "NO", "dynamo_mode": "default", "dynamo_use": False}},
        {"ipex_config": {"ipex": False}},
    ],
)
def test_what_is_off_is_taken_however_it_is_spelled(content: dict[str, Any]) -> None:
    assert _said(content)["engine.name"] == ("single", "acc.yaml: distributed_type")


def test_all_that_can_not_be_followed_is_named_at_once() -> None:
    content = {
        "distributed_type": "MEGATRON_LM",
        "mixed_precision": "fp8",
        "num_machines": 3,
        "num_processes": 8,
        "megatron_lm_config": {"megatron_lm_tp_degree": 2},
        "tpu_name": "",
    }

    with pytest.raises(ConfigError) as raised:
        overrides(content, label="acc.yaml")

    assert raised.value.faults == (
        "acc.yaml: distributed_type MEGATRON_LM is not supported; use NO, MULTI_GPU, MULTI_CPU, "
        "DEEPSPEED, FSDP",
        "acc.yaml: mixed_precision fp8 is not supported; use no, bf16, fp16",
        "acc.yaml: num_processes 8 is not divisible by num_machines 3",
        "acc.yaml: megatron_lm_config has no counterpart here; leave it out",
    )


def test_values_of_the_wrong_type_and_sections_of_another_kind_are_named() -> None:
    content = {"num_processes": "two", "deepspeed_config": [3], "use_cpu": "yes", "num_machines": 0}

    with pytest.raises(ConfigError) as raised:
        overrides(content, label="acc.yaml")
    assert raised.value.faults == (
        "acc.yaml: deepspeed_config is [3], not a section",
        "acc.yaml: num_processes is 'two', not a whole number",
        "acc.yaml: num_machines is 0; it must be at least 1",
        "acc.yaml: use_cpu is 'yes', not true or false",
    )
    other = {"distributed_type": "FSDP", "deepspeed_config": {"zero_stage": 3}}
    with pytest.raises(ConfigError) as raised:
        overrides(other, label="acc.yaml")
    assert raised.value.faults == (
        "acc.yaml: deepspeed_config is said, but distributed_type is FSDP; leave one out",
    )


def test_chosen_gpus_are_the_ones_that_the_ranks_see() -> None:
    said = _said({"distributed_type": "MULTI_GPU", "num_processes": 2, "gpu_ids": "2,3"})

    assert said["cluster.env.CUDA_VISIBLE_DEVICES"] == ("2,3", "acc.yaml: gpu_ids")
    assert "cluster.env.CUDA_VISIBLE_DEVICES" not in _said({"gpu_ids": "all"})


def _variables(engine: EngineName, device: Any = "cuda", **options: Any) -> dict[str, str]:
    training = {"bf16": True, "max_grad_norm": 0.5}
    config = translate(
        training,
        engine=engine,
        topology=topology_for(engine, procs_per_node=2),
        device=device,
        options=EngineOptions(**options),
    ).engine
    return accelerate_environment.variables(config, device=device, training=training)


def test_variables_of_zero3_golden() -> None:
    found = _variables("zero3", offload_optimizer="cpu", secondary_shard=2)

    given = json.loads(found.pop("ACCELERATE_DEEPSPEED_CONFIG_FILE"))
    assert found == {
        "ACCELERATE_USE_DEEPSPEED": "true",
        "ACCELERATE_DEEPSPEED_ZERO3_INIT": "true",
        "ACCELERATE_MIXED_PRECISION": "bf16",
    }
    assert [key for key, value in given.items() if value == "auto"] == [
        "train_batch_size",
        "train_micro_batch_size_per_gpu",
        "gradient_accumulation_steps",
    ]
    assert given["gradient_clipping"] == 0.5
    assert given["bf16"]["enabled"] == "auto"
    zero = given["zero_optimization"]
    assert (zero["stage"], zero["zero_hpz_partition_size"]) == (3, 2)
    assert zero["offload_optimizer"]["device"] == "cpu"
    assert zero["stage3_gather_16bit_weights_on_model_save"] is True


def test_accelerate_takes_the_json_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    from accelerate.utils import DeepSpeedPlugin

    for name, value in _variables("zero2", reduce_dtype="bf16").items():
        monkeypatch.setenv(name, value)

    plugin = DeepSpeedPlugin()

    assert plugin.zero_stage == 2
    assert plugin.deepspeed_config["communication_data_type"] == "bf16"


def test_options_that_a_script_would_not_hear_of_are_refused(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text("import accelerate\n")
    said = (
        Override(key="engine", value="fsdp", origin="flag --engine"),
        Override(key="engine.forward_prefetch", value=2, origin="--set"),
        Override(key="cluster.procs_per_node", value=2, origin="--set"),
    )
    surroundings = Surroundings(environment={}, working_dir=tmp_path, is_rehearsal=True)

    with pytest.raises(ConfigError) as raised:
        make_plan(Request(target="train.py", overrides=said), surroundings)

    assert str(raised.value) == (
        "--set: engine.forward_prefetch: accelerate has no variable for it; leave it out, or use "
        "bigtrain's Trainer in the script"
    )


def test_variables_of_fsdp_golden() -> None:
    assert _variables("fsdp", wrap_classes=("A", "B"), reshard_after_forward=False) == {
        "ACCELERATE_USE_FSDP": "true",
        "FSDP_VERSION": "2",
        "FSDP_RESHARD_AFTER_FORWARD": "false",
        "FSDP_OFFLOAD_PARAMS": "false",
        "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
        "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
        "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",
        "FSDP_ACTIVATION_CHECKPOINTING": "false",
        "FSDP_TRANSFORMER_CLS_TO_WRAP": "A,B",
        "ACCELERATE_MIXED_PRECISION": "bf16",
    }


def test_on_a_cpu_plain_ranks_are_told_so_and_sharded_ones_are_not() -> None:
    assert _variables("ddp", "cpu")["ACCELERATE_USE_CPU"] == "true"
    sharded = _variables("fsdp", "cpu")
    assert "ACCELERATE_USE_CPU" not in sharded
    assert sharded["ACCELERATE_TORCH_DEVICE"] == "cpu"
