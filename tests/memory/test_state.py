"""The bytes that are planned are those of the engines' live tensors, to the byte."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from bigtrain.memory.optimizers import optimizer_shape
from bigtrain.memory.shapes import ModelShapes, Parameter
from bigtrain.memory.state import Placement, StateBytes, state_bytes
from bigtrain.model_section import add_adapters
from bigtrain.topology import RankInfo
from bigtrain.translate import topology_for, translate
from bigtrain.translate.config import ENGINE_NAMES, EngineConfig, EngineName
from tests.engine.harness import run_ranks
from tests.memory.live import measure, train_to_gradients

# Nothing is a multiple of 2 or 3: every rank's part is cut and padded.
_FIELDS: dict[str, Any] = {
    "hidden_size": 20,
    "intermediate_size": 37,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 61,
}
MODELS: dict[str, dict[str, Any]] = {
    "odd": {},
    "tied": {"tie_word_embeddings": True},
    "frozen": {"frozen": ("embed_tokens", "layers.0.mlp")},
    "bf16 weights": {"dtype": torch.bfloat16},
    "lora": {"dtype": torch.bfloat16, "lora": True},
}
_LORA = {"rank": 3, "alpha": 6, "dropout": 0.0, "target_modules": ["q_proj", "o_proj"]}
Measured = dict[tuple[EngineName, str, str], tuple[int, StateBytes]]


def make_model(key: str) -> nn.Module:
    fields = dict(MODELS[key])
    has_adapters = fields.pop("lora", False)
    frozen, dtype = fields.pop("frozen", ()), fields.pop("dtype", torch.float32)
    torch.manual_seed(0)
    model: nn.Module = LlamaForCausalLM(LlamaConfig(**_FIELDS, **fields)).to(dtype)
    if has_adapters:
        return add_adapters(model, _LORA)  # type: ignore[no-any-return]
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not any(part in name for part in frozen))
    return model


def shapes_of(key: str) -> ModelShapes:
    words = {torch.float32: "fp32", torch.bfloat16: "bf16"}
    return ModelShapes(
        parameters=tuple(
            Parameter(
                name=name, shape=tuple(p.shape), dtype=words[p.dtype], trained=p.requires_grad
            )
            for name, p in make_model(key).named_parameters()
        ),
        source="the model itself",
    )


def engine_config(name: EngineName, dtype: str, ranks: int) -> EngineConfig:
    return translate(
        {"bf16": dtype == "bf16", "fp16": dtype == "fp16"},
        engine=name,
        topology=topology_for(name, procs_per_node=ranks),
        device="cpu",
        hidden_size=20,
    ).engine


def _measure_all(world: RankInfo, engines: list[EngineName]) -> Measured:
    found: Measured = {}
    for name in engines:
        for dtype, key in _cases(name):
            config = engine_config(name, dtype, world.world_size)
            engine, model, numel = train_to_gradients(world, config, lambda k=key: make_model(k))
            found[name, dtype, key] = numel, copy.copy(measure(engine, model))
            engine.close()
    return found


def _cases(name: EngineName) -> Iterator[tuple[str, str]]:
    """Precision and model. On a CPU DeepSpeed has no fp16, and autocast no fp16 beside bf16."""
    for dtype in ("fp32", "bf16"):
        yield from ((dtype, key) for key in MODELS)
    if not name.startswith("zero"):
        yield from (("fp16", key) for key, fields in MODELS.items() if "dtype" not in fields)


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_planned_bytes_are_the_live_ones(ranks: int) -> None:
    engines = [name for name in ENGINE_NAMES if ranks == 1 or name != "single"]
    wrong = []
    for rank, found in enumerate(run_ranks(ranks, _measure_all, engines)):
        for (name, dtype, key), (numel, live) in found.items():
            shapes = shapes_of(key)
            place = Placement(
                config=engine_config(name, dtype, ranks),
                topology=topology_for(name, procs_per_node=ranks),
                optimizer=optimizer_shape("adamw_torch"),
                rank=rank,
            )
            planned = state_bytes(shapes, place)
            if name == "ddp":  # torch's Reducer keeps its buckets out of Python's sight
                assert planned.buffers == planned.gradients
                planned = StateBytes(**{**vars(planned), "buffers": 0})
            assert shapes.numel == numel
            if planned != live:
                wrong.append(f"{name} {dtype} {key} rank {rank}:\n  {planned}\n  {live}")
    assert not wrong, "\n".join(wrong)
