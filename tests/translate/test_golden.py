"""What each engine is told, whole, as it lies in `golden/`: a change of it is seen in review.

python -m tests.translate.test_golden     # writes them anew
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from bigtrain.translate import topology_for, translate
from bigtrain.translate.config import EngineConfig, EngineOptions

_FOLDER = Path(__file__).with_name("golden")
_BF16: Mapping[str, Any] = {
    "bf16": True,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 3,
    "max_grad_norm": 0.5,
}
_NVME = {"offload_optimizer": "nvme", "offload_parameters": "nvme", "nvme_path": "/local/swap"}
_CPU = {"offload_optimizer": "cpu"}
_GIVEN = {
    "train_batch_size": "auto",
    "gradient_clipping": "auto",
    "bf16": {"enabled": "auto"},
    "zero_optimization": {
        "stage": 3,
        "overlap_comm": False,
        "reduce_scatter": False,
        "reduce_bucket_size": "auto",
        "sub_group_size": 1e8,
        "offload_optimizer": {"device": "cpu", "pin_memory": False},
    },
    "gradient_predivide_factor": 2.0,
}
# Name → engine, its options, and what differs from bf16 on two nodes of four GPUs.
CASES: Mapping[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "single": ("single", {}, {"values": {"fp16": True}, "nodes": 1, "procs_per_node": 1}),
    "ddp": ("ddp", {}, {"values": {"ddp_find_unused_parameters": True, "ddp_bucket_cap_mb": 50}}),
    "fsdp": ("fsdp", {}, {}),
    "fsdp-hybrid": ("fsdp", {}, {"shard": 4}),
    "fsdp-by-fsdp1-words": (
        "fsdp",
        {},
        {
            "values": {
                "fsdp": "hybrid_shard_zero2 auto_wrap offload",
                "fsdp_config": {"fsdp_transformer_layer_cls_to_wrap": "Block"},
            },
            "shard": 4,
        },
    ),
    "fsdp-all-options": (
        "fsdp",
        {
            "master_dtype": "bf16",
            "reduce_dtype": "bf16",
            "reshard_after_forward": False,
            "cpu_offload": True,
            "wrap_classes": ("Block", "Head"),
            "forward_prefetch": 2,
            "reduce_each_micro_batch": True,
        },
        {},
    ),
    "zero1": ("zero1", {}, {}),
    "zero1-fp32-offload-cpu": ("zero1", _CPU, {"values": {}}),
    "zero2-fp16": ("zero2", {}, {"values": {"fp16": True}}),
    "zero2-offload-cpu": ("zero2", _CPU, {}),
    "zero3": ("zero3", {}, {}),
    "zero3-on-a-cpu": ("zero3", {}, {"device": "cpu", "hidden_size": None}),
    "zero3-recomputed": ("zero3", {}, {"values": {"bf16": True, "gradient_checkpointing": True}}),
    "zero3-bf16-masters": ("zero3", {"master_dtype": "bf16", "reduce_dtype": "bf16"}, {}),
    "zero3-offload-cpu": ("zero3", {**_CPU, "offload_parameters": "cpu"}, {}),
    "zero3-offload-nvme": ("zero3", _NVME, {}),
    "zero3-hierarchical": ("zero3", {"secondary_shard": 4}, {}),
    "zero3-plus-plus": (
        "zero3",
        {"secondary_shard": 4, "quantized_weights": True, "quantized_gradients": True},
        {},
    ),
    "zero3-given": ("zero3", {}, {"values": {"bf16": True, "deepspeed": _GIVEN}}),
}


def _told(case: str) -> EngineConfig:
    engine, options, more = CASES[case]
    name: Any = engine
    topology = topology_for(
        name,
        nodes=more.get("nodes", 2),
        procs_per_node=more.get("procs_per_node", 4),
        shard=more.get("shard"),
    )
    return translate(
        more.get("values", _BF16),
        engine=name,
        topology=topology,
        device=more.get("device", "cuda"),
        options=EngineOptions(shard=more.get("shard"), **options),
        hidden_size=more.get("hidden_size", 1024),
    ).engine


def _text(case: str) -> str:
    return json.dumps(dataclasses.asdict(_told(case)), indent=2) + "\n"


@pytest.mark.parametrize("case", CASES)
def test_an_engine_is_told_what_it_always_was(case: str) -> None:
    text = _text(case)

    assert text == (_FOLDER / f"{case}.json").read_text(encoding="utf-8")
    assert '"auto"' not in text


def test_there_is_no_other_golden_text() -> None:
    assert {path.stem for path in _FOLDER.iterdir()} == set(CASES)


if __name__ == "__main__":
    _FOLDER.mkdir(exist_ok=True)
    for _case in CASES:
        (_FOLDER / f"{_case}.json").write_text(_text(_case), encoding="utf-8")
