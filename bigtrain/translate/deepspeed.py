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
            "zero_optimization": _zero(stage, options, on_cpu=on_cpu, hidden_size=hidden_size),
            **_nvme_access(options),
            # How `deepspeed.checkpointing` would recompute, for models that call it themselves;
            # gradient_checkpointing is the model's own.
            "activation_checkpointing": {
                "partition_activations": False,
                "contiguous_memory_optimization": False,
                "cpu_checkpointing": False,
                "synchronize_checkpoint_boundary": False,
                "profile": False,
            },
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


def faults(
    options: EngineOptions, topology: Topology, *, stage: int, on_cpu: bool
) -> Iterator[tuple[str, str]]:
    """(engine key, what is wrong and the fix) for options that ZeRO does not have here."""
    if topology.shard_size != topology.world_size:
        yield (
            "shard",
            f"ZeRO shards over all {topology.world_size} ranks, not {topology.shard_size}; "
            "leave shard out, or use engine fsdp",
        )
    for key in _FSDP_ONLY:
        if getattr(options, key):
            yield key, "not supported with ZeRO; leave it out, or use engine fsdp"
    yield from _stage_faults(options, stage=stage)
    yield from _nvme_faults(options)
    shard = options.secondary_shard
    if shard is not None and (shard < 1 or topology.world_size % shard):
        yield (
            "secondary_shard",
            f"{shard} does not divide the {topology.world_size} ranks; use the ranks of one node",
        )
    if options.master_dtype == "bf16" and options.offload_optimizer:
        yield (
            "master_dtype",
            "bf16 with an offloaded optimizer needs DeepSpeed's own Adam, and the loop hands in "
            "torch's; leave one out",
        )
    for key in ("quantized_weights", "quantized_gradients"):
        if getattr(options, key) and on_cpu:
            yield key, "DeepSpeed's quantizer needs a GPU; leave it out"


_FSDP_ONLY = (
    "cpu_offload",
    "reshard_after_forward",
    "wrap_classes",
    "forward_prefetch",
    "reduce_each_micro_batch",
)
ZERO_ONLY = (
    "offload_optimizer",
    "offload_parameters",
    "nvme_path",
    "secondary_shard",
    "quantized_weights",
    "quantized_gradients",
)
"""Engine options that only ZeRO has."""
_STAGE_3_ONLY = (
    "offload_parameters",
    "secondary_shard",
    "quantized_weights",
    "quantized_gradients",
)


def _stage_faults(options: EngineOptions, *, stage: int) -> Iterator[tuple[str, str]]:
    if stage == 3:
        return
    for key in _STAGE_3_ONLY:
        if getattr(options, key):
            yield key, f"ZeRO-{stage} does not cut the weights; leave it out, or use engine zero3"
    if options.offload_optimizer == "nvme":
        yield "offload_optimizer", "nvme needs engine zero3; use it, or cpu"


def _nvme_faults(options: EngineOptions) -> Iterator[tuple[str, str]]:
    uses_nvme = "nvme" in (options.offload_optimizer, options.offload_parameters)
    if uses_nvme and not options.nvme_path:
        yield "nvme_path", "missing; offload to nvme needs a directory on a local disk"
    if options.nvme_path and not uses_nvme:
        yield "nvme_path", "nothing is offloaded to nvme; leave it out"


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
        # Gradients are summed over ranks and over micro-batches in fp32, whatever computes them,
        # unless another precision is asked for.
        "communication_data_type": options.reduce_dtype or "fp32",
        "data_types": {"grad_accum_dtype": "bf16" if bf16_masters else "fp32"},
    }


def _zero(
    stage: int, options: EngineOptions, *, on_cpu: bool, hidden_size: int | None
) -> dict[str, Any]:
    """Buckets in elements, sized by the model's widest usual matrix (hidden²) as transformers does:
    https://huggingface.co/docs/transformers/deepspeed (`reduce_bucket_size`)."""
    hidden = hidden_size or _USUAL_HIDDEN_SIZE
    bucket = max(hidden * hidden, _LEAST_BUCKET)
    bucket += bucket % 2  # stages 1 and 2 refuse an odd one
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
            "zero_hpz_partition_size": options.secondary_shard or 1,
            "zero_quantized_weights": bool(options.quantized_weights),
            "zero_quantized_gradients": bool(options.quantized_gradients),
        }
    return zero | _offload(options, on_cpu=on_cpu)


def _offload(options: EngineOptions, *, on_cpu: bool) -> dict[str, Any]:
    """https://www.deepspeed.ai/docs/config-json/#parameter-offloading, whole. Pinned memory makes
    copies to and from a GPU asynchronous; without a GPU there is nothing to pin for."""
    found: dict[str, Any] = {}
    if options.offload_optimizer:
        found["offload_optimizer"] = {
            "device": options.offload_optimizer,
            **_nvme_place(options, options.offload_optimizer),
            "pin_memory": not on_cpu,
            "buffer_count": 4,  # Adam's parameter, gradient and two moments
            "fast_init": False,
            "pipeline_read": options.offload_optimizer == "nvme",
            "pipeline_write": options.offload_optimizer == "nvme",
            "ratio": 1.0,
        }
    if options.offload_parameters:
        found["offload_param"] = {
            "device": options.offload_parameters,
            **_nvme_place(options, options.offload_parameters),
            "pin_memory": not on_cpu,
            "buffer_count": 5,
            "buffer_size": 100_000_000,
            "max_in_cpu": 1_000_000_000,
        }
    return found


def _nvme_place(options: EngineOptions, device: str) -> dict[str, str]:
    return {"nvme_path": str(options.nvme_path)} if device == "nvme" else {}


def _nvme_access(options: EngineOptions) -> dict[str, Any]:
    """How NVMe is read and written; the values of DeepSpeed's own tuning for one drive."""
    if "nvme" not in (options.offload_optimizer, options.offload_parameters):
        return {}
    return {
        "aio": {
            "block_size": 1_048_576,
            "queue_depth": 8,
            "intra_op_parallelism": 1,
            "single_submit": False,
            "overlap_events": True,
        }
    }
