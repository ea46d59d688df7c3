"""The JSON that DeepSpeed is given: complete, with no key left to a default that might move.

Keys are those of https://www.deepspeed.ai/docs/config-json/. DeepSpeed accepts a misspelt key
without a word, so a test compares every leaf with the attribute that DeepSpeed parsed from it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal

from bigtrain.topology import Topology
from bigtrain.translate.config import DeepSpeedSettings, DTypeName, EngineOptions

_USUAL_HIDDEN_SIZE = 4096
_LEAST_BUCKET = 500_000
_NEVER = 1_000_000_000


def settings(
    values: Mapping[str, Any],
    *,
    stage: Literal[1, 2, 3],
    topology: Topology,
    compute: DTypeName,
    options: EngineOptions,
    on_cpu: bool,
    hidden_size: int | None,
) -> DeepSpeedSettings:
    """ZeRO at `stage`; the optimizer and the schedule stay with the loop."""
    micro_batch = values["per_device_train_batch_size"]
    accumulation = values["gradient_accumulation_steps"]
    return DeepSpeedSettings(
        zero_stage=stage,
        json={
            "train_batch_size": micro_batch * accumulation * topology.world_size,
            "train_micro_batch_size_per_gpu": micro_batch,
            "gradient_accumulation_steps": accumulation,
            "gradient_clipping": float(values["max_grad_norm"] or 0.0),
            **_precision(compute, options),
            "zero_optimization": _zero(stage, on_cpu=on_cpu, hidden_size=hidden_size),
            # The loop hands in a torch optimizer, which DeepSpeed calls untested.
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "steps_per_print": _NEVER,
            "wall_clock_breakdown": False,
        },
    )


def mapped(config: DeepSpeedSettings) -> dict[str, str]:
    """TrainingArguments field → DeepSpeed's key and value."""
    json = config.json
    keys = {
        "per_device_train_batch_size": "train_micro_batch_size_per_gpu",
        "gradient_accumulation_steps": "gradient_accumulation_steps",
        "max_grad_norm": "gradient_clipping",
    }
    found = {argument: f"{key} = {json[key]}" for argument, key in keys.items()}
    for dtype in ("bf16", "fp16"):
        found[dtype] = f"{dtype}.enabled = {str(json[dtype]['enabled']).lower()}"
    return found


def faults(options: EngineOptions, topology: Topology) -> Iterator[tuple[str, str]]:
    """(engine key, what is wrong and the fix) for options that ZeRO does not have here."""
    if topology.shard_size != topology.world_size:
        yield (
            "shard",
            f"ZeRO shards over all {topology.world_size} ranks, not {topology.shard_size}; "
            "leave shard out, or use engine fsdp",
        )
    for key in ("cpu_offload", "reshard_after_forward", "wrap_classes"):
        if getattr(options, key):
            yield key, "not supported with ZeRO; leave it out, or use engine fsdp"


def _precision(compute: DTypeName, options: EngineOptions) -> dict[str, Any]:
    bf16_masters = options.master_dtype == "bf16"
    return {
        "bf16": {
            "enabled": compute == "bf16",
            "bf16_master_weights_and_grads": bf16_masters,
            "bf16_optimizer_states": bf16_masters,
        },
        "fp16": {
            "enabled": compute == "fp16",
            "auto_cast": False,
            "loss_scale": 0,
            "initial_scale_power": 16,
            "loss_scale_window": 1000,
            "hysteresis": 2,
            "min_loss_scale": 1,
        },
        # Gradients are summed over ranks and over micro-batches in fp32, whatever computes them.
        "communication_data_type": "fp32",
        "data_types": {"grad_accum_dtype": "bf16" if bf16_masters else "fp32"},
    }


def _zero(stage: int, *, on_cpu: bool, hidden_size: int | None) -> dict[str, Any]:
    """Buckets in elements, sized by the model's widest usual matrix (hidden²) as transformers does:
    https://huggingface.co/docs/transformers/deepspeed (`reduce_bucket_size`)."""
    hidden = hidden_size or _USUAL_HIDDEN_SIZE
    bucket = max(hidden * hidden, _LEAST_BUCKET)
    zero: dict[str, Any] = {
        "stage": stage,
        "contiguous_gradients": True,
        "overlap_comm": not on_cpu,  # overlapping needs streams, which a CPU has not
        "reduce_scatter": True,
        "reduce_bucket_size": bucket,
        "allgather_partitions": True,
        "allgather_bucket_size": bucket,
        "round_robin_gradients": False,
    }
    if stage == 3:
        zero |= {
            "sub_group_size": 1_000_000_000,
            "stage3_prefetch_bucket_size": bucket * 9 // 10,
            "stage3_param_persistence_threshold": 10 * hidden,
            "stage3_max_live_parameters": 1_000_000_000,
            "stage3_max_reuse_distance": 1_000_000_000,
            # Export goes tensor by tensor, so nothing is ever gathered whole.
            "stage3_gather_16bit_weights_on_model_save": False,
        }
    return zero
