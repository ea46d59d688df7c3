"""DeepSpeed's JSON: golden, whole, and understood by DeepSpeed leaf by leaf."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from bigtrain.errors import UnsupportedError
from bigtrain.translate import deepspeed_keys, topology_for, translate
from bigtrain.translate.config import DeepSpeedSettings, EngineName, EngineOptions

_VALUES = {
    "bf16": True,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 3,
    "max_grad_norm": 0.5,
}


def _json(engine: EngineName = "zero3", **more: Any) -> dict[str, Any]:
    values = more.pop("values", _VALUES)
    settings = translate(
        values,
        engine=engine,
        topology=topology_for(engine, procs_per_node=2),
        device=more.pop("device", "cpu"),
        hidden_size=more.pop("hidden_size", 1024),
        **more,
    ).engine.settings
    assert isinstance(settings, DeepSpeedSettings)
    return dict(settings.json)


def test_zero3_golden() -> None:
    assert _json() == {
        "train_batch_size": 24,
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": 3,
        "gradient_clipping": 0.5,
        "bf16": {
            "enabled": True,
            "bf16_master_weights_and_grads": False,
            "bf16_optimizer_states": False,
        },
        "fp16": {
            "enabled": False,
            "auto_cast": False,
            "loss_scale": 0,
            "initial_scale_power": 16,
            "loss_scale_window": 1000,
            "hysteresis": 2,
            "min_loss_scale": 1,
        },
        "communication_data_type": "fp32",
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_optimization": {
            "stage": 3,
            "contiguous_gradients": True,
            "overlap_comm": False,
            "reduce_scatter": True,
            "reduce_bucket_size": 1_048_576,
            "allgather_partitions": True,
            "allgather_bucket_size": 1_048_576,
            "round_robin_gradients": False,
            "sub_group_size": 1_000_000_000,
            "stage3_prefetch_bucket_size": 943_718,
            "stage3_param_persistence_threshold": 10_240,
            "stage3_max_live_parameters": 1_000_000_000,
            "stage3_max_reuse_distance": 1_000_000_000,
            "stage3_gather_16bit_weights_on_model_save": False,
            "zero_hpz_partition_size": 1,
            "zero_quantized_weights": False,
            "zero_quantized_gradients": False,
        },
        "activation_checkpointing": {
            "partition_activations": False,
            "contiguous_memory_optimization": False,
            "cpu_checkpointing": False,
            "synchronize_checkpoint_boundary": False,
            "profile": False,
        },
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 1_000_000_000,
        "wall_clock_breakdown": False,
    }


@pytest.mark.parametrize(("engine", "stage"), [("zero1", 1), ("zero2", 2)])
def test_the_lower_stages_have_no_keys_of_stage_3(engine: EngineName, stage: int) -> None:
    zero = _json(engine)["zero_optimization"]

    assert zero["stage"] == stage
    assert not [key for key in zero if key.startswith(("stage3", "sub_group"))]


def test_clipping_that_is_off_is_zero() -> None:
    assert _json(values={"max_grad_norm": 0})["gradient_clipping"] == 0.0


def test_nothing_is_left_to_be_guessed() -> None:
    assert "auto" not in [value for _, value in _leaves(_json())]


# Where DeepSpeed keeps what it parsed. `_param_dict` would be no proof: it is the input itself,
# and DeepSpeed takes a misspelt key without a word.
_PARSED_AT = {
    "bf16": "bfloat16_config",
    "fp16": "float16_config",
    "zero_optimization": "zero_config",
    "activation_checkpointing": "activation_checkpointing_config",
    "communication_data_type": "communication_data_type",
    "data_types.grad_accum_dtype": "grad_accum_dtype",
}


def _leaves(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _parsed(config: Any, path: str) -> Any:
    """What DeepSpeed's config object holds for a key of the JSON; AttributeError if nothing."""
    if path in _PARSED_AT:
        return getattr(config, _PARSED_AT[path])
    section, _, key = path.rpartition(".")
    if not section:
        return getattr(config, key)
    if section == "aio":
        return config.aio_config[key]
    outer, _, inner = section.partition(".")
    model = getattr(config, _PARSED_AT[outer])
    model = getattr(model, inner) if inner else model
    if not hasattr(type(model), "model_fields"):
        return getattr(model, key)
    fields = type(model).model_fields
    name = next((name for name, field in fields.items() if field.alias == key), key)
    if name not in fields:
        raise AttributeError(f"{section} has no {key}")
    return getattr(model, name)


def _misunderstood(json: dict[str, Any]) -> list[str]:
    """The leaves that DeepSpeed did not parse as they were meant."""
    import torch
    from deepspeed.runtime.config import DeepSpeedConfig

    config = DeepSpeedConfig(copy.deepcopy(json), mesh_device=_TwoRanks())
    dtypes = {torch.float32: "fp32", torch.bfloat16: "bf16"}
    wrong = []
    for path, value in _leaves(json):
        try:
            parsed = _parsed(config, path)
        except (AttributeError, KeyError):
            wrong.append(path)
            continue
        parsed = str(parsed) if isinstance(parsed, Path) else parsed
        if dtypes.get(parsed, parsed) != value:
            wrong.append(path)
    return wrong


class _TwoRanks:
    """A device mesh of two data-parallel ranks, as much of one as the config asks about."""

    def get_group(self, *, mesh_dim: str) -> None: ...


@pytest.fixture(autouse=True)
def _two_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    import deepspeed.comm

    monkeypatch.setattr(deepspeed.comm, "get_world_size", lambda group=None: 2)
    monkeypatch.setattr(deepspeed.comm, "get_rank", lambda group=None: 0)


@pytest.mark.parametrize("engine", ["zero1", "zero2", "zero3"])
def test_deepspeed_parses_every_leaf_as_it_was_meant(engine: EngineName) -> None:
    assert _misunderstood(_json(engine)) == []
    assert _misunderstood(_json(engine, values=_VALUES | {"max_grad_norm": 0})) == []
    masters = EngineOptions(master_dtype="bf16")
    assert _misunderstood(_json(engine, options=masters)) == []
    fp16 = {"fp16": True, "per_device_train_batch_size": 2}
    assert _misunderstood(_json(engine, values=fp16, device="cuda")) == []
    reduce = EngineOptions(reduce_dtype="bf16")
    assert _misunderstood(_json(engine, options=reduce)) == []
    offload = EngineOptions(offload_optimizer="cpu")
    assert _misunderstood(_json(engine, options=offload, device="cuda")) == []


def test_deepspeed_parses_every_leaf_of_offload_and_zero_plus_plus() -> None:
    nvme = EngineOptions(
        offload_optimizer="nvme", offload_parameters="nvme", nvme_path="/local/swap"
    )
    plus = EngineOptions(
        offload_parameters="cpu",
        secondary_shard=2,
        quantized_weights=True,
        quantized_gradients=True,
    )
    for options in (nvme, plus):
        json = _json(options=options, device="cuda")
        assert _misunderstood(json) == []
        json["activation_checkpointing"] = {"partition_activation": False}
        assert _misunderstood(json) == ["activation_checkpointing.partition_activation"]


def test_offload_golden() -> None:
    options = EngineOptions(
        offload_optimizer="cpu", offload_parameters="nvme", nvme_path="/local/swap"
    )

    json = _json(options=options, device="cuda")

    assert json["zero_optimization"]["offload_optimizer"] == {
        "device": "cpu",
        "pin_memory": True,
        "buffer_count": 4,
        "fast_init": False,
        "pipeline_read": False,
        "pipeline_write": False,
        "ratio": 1.0,
    }
    assert json["zero_optimization"]["offload_param"] == {
        "device": "nvme",
        "nvme_path": "/local/swap",
        "pin_memory": True,
        "buffer_count": 5,
        "buffer_size": 100_000_000,
        "max_in_cpu": 1_000_000_000,
    }
    assert json["aio"]["block_size"] == 1_048_576


@pytest.mark.parametrize(
    ("engine", "options", "fault"),
    [
        (
            "zero2",
            EngineOptions(offload_parameters="cpu"),
            "engine.offload_parameters: ZeRO-2 does not cut the weights; leave it out, or use "
            "engine zero3",
        ),
        (
            "zero3",
            EngineOptions(offload_optimizer="nvme"),
            "engine.nvme_path: missing; offload to nvme needs a directory on a local disk",
        ),
        (
            "zero3",
            EngineOptions(secondary_shard=3),
            "engine.secondary_shard: 3 does not divide the 2 ranks; use the ranks of one node",
        ),
        (
            "zero3",
            EngineOptions(secondary_shard=0),
            "engine.secondary_shard: 0 does not divide the 2 ranks; use the ranks of one node",
        ),
        (
            "zero3",
            EngineOptions(quantized_weights=True),
            "engine.quantized_weights: DeepSpeed's quantizer needs a GPU; leave it out",
        ),
        (
            "zero2",
            EngineOptions(offload_optimizer="cpu", master_dtype="bf16"),
            "engine.master_dtype: bf16 with an offloaded optimizer needs DeepSpeed's own Adam, and "
            "the loop hands in torch's; leave one out",
        ),
        (
            "fsdp",
            EngineOptions(offload_optimizer="cpu"),
            "engine.offload_optimizer: fsdp has no such option; leave it out, or use zero3",
        ),
    ],
)
def test_options_that_an_engine_lacks_are_refused(
    engine: EngineName, options: EngineOptions, fault: str
) -> None:
    with pytest.raises(UnsupportedError) as raised:
        _json(engine, values={"bf16": True}, options=options)

    assert raised.value.faults == (fault,)


_DTYPES: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16": {"bf16": True},
    "fp16": {"fp16": True},
    "bf16 masters": {"bf16": True},
}
_OFFLOADS: dict[str, dict[str, Any]] = {
    "none": {},
    "optimizer to cpu": {"offload_optimizer": "cpu"},
    "both to cpu": {"offload_optimizer": "cpu", "offload_parameters": "cpu"},
    "both to nvme": {
        "offload_optimizer": "nvme",
        "offload_parameters": "nvme",
        "nvme_path": "/local/swap",
    },
    "parameters to nvme": {"offload_parameters": "nvme", "nvme_path": "/local/swap"},
}
_STAGE_3 = ("both to cpu", "both to nvme", "parameters to nvme")
_COMBINATIONS = [
    pytest.param(engine, offload, dtype, id=f"{engine}-{offload}-{dtype}")
    for engine in ("zero1", "zero2", "zero3")
    for offload in _OFFLOADS
    for dtype in _DTYPES
    if engine == "zero3" or offload not in _STAGE_3
    if dtype != "bf16 masters" or "offload_optimizer" not in _OFFLOADS[offload]
]


@pytest.mark.parametrize(("engine", "offload", "dtype"), _COMBINATIONS)
def test_every_stage_offload_and_precision_is_whole_and_understood(
    engine: EngineName, offload: str, dtype: str
) -> None:
    masters: Any = "bf16" if dtype == "bf16 masters" else None
    options = EngineOptions(**_OFFLOADS[offload], master_dtype=masters)

    json = _json(engine, values=_DTYPES[dtype], options=options, device="cuda")

    assert _misunderstood(json) == []
    zero = json["zero_optimization"]
    said = _OFFLOADS[offload]
    assert zero["stage"] == int(engine[-1])
    assert (zero.get("offload_optimizer") or {}).get("device") == said.get("offload_optimizer")
    assert (zero.get("offload_param") or {}).get("device") == said.get("offload_parameters")
    assert ("aio" in json) == ("nvme_path" in said)
    assert [json[key]["enabled"] for key in ("bf16", "fp16")] == [
        dtype.startswith("bf16"),
        dtype == "fp16",
    ]
    assert json["bf16"]["bf16_master_weights_and_grads"] == (masters == "bf16")
    assert json["data_types"] == {"grad_accum_dtype": masters or "fp32"}
    assert "auto" not in [value for _, value in _leaves(json)]


@pytest.mark.parametrize("engine", ["zero1", "zero2", "zero3"])
def test_a_given_file_comes_through_to_what_deepspeed_parses(engine: EngineName) -> None:
    given = {
        "communication_data_type": "bf16",
        "gradient_predivide_factor": 2.0,
        "prescale_gradients": True,
        "zero_optimization": {
            "stage": int(engine[-1]),
            "reduce_scatter": False,
            "reduce_bucket_size": 5e7,
            "overlap_comm": True,
            "ignore_unused_parameters": False,
            "offload_optimizer": {"device": "cpu", "buffer_count": 6, "pin_memory": False},
        },
        "bf16": {"enabled": "auto", "check_grad_overflow": True},
    }

    json = _json(engine, values=_VALUES | {"deepspeed": given}, device="cuda")

    assert _misunderstood(json) == []
    assert json["zero_optimization"]["offload_optimizer"]["buffer_count"] == 6
    assert json["zero_optimization"]["reduce_bucket_size"] == 50_000_000
    assert json["communication_data_type"] == "bf16"


def test_every_key_that_is_emitted_is_one_that_given_files_may_have() -> None:
    whole = EngineOptions(
        offload_optimizer="nvme", offload_parameters="nvme", nvme_path="/local", secondary_shard=2
    )
    for engine in ("zero1", "zero2", "zero3"):
        options = whole if engine == "zero3" else EngineOptions(offload_optimizer="cpu")
        json = _json(engine, options=options, device="cuda")
        assert list(deepspeed_keys.unknown(json)) == []
        assert list(deepspeed_keys.mistyped(json)) == []


def test_a_misspelt_key_is_noticed() -> None:
    json = _json()
    json["gradient_clippping"] = json.pop("gradient_clipping")
    json["data_types"] = {"grad_acum_dtype": "fp32"}

    assert _misunderstood(json) == ["data_types.grad_acum_dtype", "gradient_clippping"]


def _misspelt(json: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The JSON with one leaf's name changed, for every leaf."""
    for key, value in json.items():
        if isinstance(value, Mapping):
            for path, changed in _misspelt(value):
                yield f"{key}.{path}", {**json, key: changed}
        else:
            others = {other: kept for other, kept in json.items() if other != key}
            yield f"{key}s", {**others, f"{key}s": value}


def test_every_key_is_noticed_when_it_is_misspelt() -> None:
    """Else the comparison would pass over it. DeepSpeed itself refuses some."""
    options = EngineOptions(
        offload_optimizer="nvme", offload_parameters="nvme", nvme_path="/local", secondary_shard=2
    )
    changes = dict(_misspelt(_json(options=options, device="cuda")))

    unseen = [path for path, changed in changes.items() if not _is_noticed(changed, path)]

    assert len(changes) > 50
    assert not unseen


def _is_noticed(json: dict[str, Any], path: str) -> bool:
    try:
        return path in _misunderstood(json)
    except (ValueError, AssertionError):
        return True
