"""What the engine tests train: tiny Llamas, fixed data, and the protocol's loop."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from bigtrain.engine import build_engine
from bigtrain.engine.protocol import Engine, LocalTensor
from bigtrain.topology import RankInfo, Topology
from bigtrain.translate import deepspeed
from bigtrain.translate.config import (
    DdpSettings,
    DTypeName,
    EngineConfig,
    EngineName,
    EngineOptions,
    EngineSettings,
    FsdpSettings,
    SingleSettings,
)

CPU = torch.device("cpu")
VOCABULARY = 64
SEQUENCE = 16
GLOBAL_BATCH = 4
SPANNING: tuple[EngineName, ...] = ("ddp", "fsdp", "zero1", "zero2", "zero3")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One way of training, the same on every engine and number of ranks."""

    compute_dtype: DTypeName = "fp32"
    steps: int = 20
    windows: tuple[int, ...] = (1,)
    """Micro-batches in each step's window, in turn; the last step's may be shorter."""
    short_last_window: int | None = None
    uneven: bool = False
    """Sequences of different lengths: the loss is summed, and divided by all ranks' tokens."""
    overflow_at: int | None = None
    """The step at which the last rank's loss is infinite."""
    tied: bool = False
    frozen: tuple[str, ...] = ()
    """Parameters are frozen whose name holds one of these."""
    model_dtype: torch.dtype = torch.float32


@dataclass(kw_only=True)
class Record:
    """What a run showed on one rank."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    skipped: list[bool] = field(default_factory=list)
    scales: list[float | None] = field(default_factory=list)
    weights: dict[str, Tensor | None] = field(default_factory=dict)
    devices: dict[str, str] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)


def engine_config(
    name: EngineName,
    *,
    world_size: int,
    dtype: DTypeName = "fp32",
    shard: int | None = None,
    options: EngineOptions | None = None,
) -> EngineConfig:
    settings = _settings(name, world_size, dtype, shard, options or EngineOptions())
    return EngineConfig(name=name, settings=settings, compute_dtype=dtype)


def _settings(
    name: EngineName, world_size: int, dtype: DTypeName, shard: int | None, options: EngineOptions
) -> EngineSettings:
    if name == "single":
        return SingleSettings()
    if name == "ddp":
        return DdpSettings()
    if name == "fsdp":
        return FsdpSettings(shard_size=shard or world_size)
    return deepspeed.settings(
        {
            "per_device_train_batch_size": 1,
            "gradient_accumulation_steps": 1,
            "max_grad_norm": 1.0,
        },
        stage={"zero1": 1, "zero2": 2, "zero3": 3}[name],  # type: ignore[arg-type]
        topology=Topology(procs_per_node=world_size, shard_size=world_size),
        compute=dtype,
        options=options,
        on_cpu=True,
        hidden_size=32,
    )


def make_model(recipe: Recipe, *, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    model = LlamaForCausalLM(_llama(recipe))
    return freeze(model.to(recipe.model_dtype), recipe)


def make_skeleton(recipe: Recipe) -> nn.Module:
    with torch.device("meta"):
        model = LlamaForCausalLM(_llama(recipe))
    return freeze(model.to(recipe.model_dtype), recipe)


def freeze(model: nn.Module, recipe: Recipe) -> nn.Module:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not any(part in name for part in recipe.frozen))
    return model


def _llama(recipe: Recipe) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=VOCABULARY,
        attention_dropout=0.0,
        tie_word_embeddings=recipe.tied,
        pad_token_id=0,
    )


def make_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    """AdamW with the two groups that transformers makes: with weight decay, and without."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=1e-3)


def prepare(
    name: EngineName,
    recipe: Recipe,
    world: RankInfo,
    *,
    seed: int = 0,
    shard: int | None = None,
) -> tuple[Engine, nn.Module, Record]:
    config = engine_config(
        name, world_size=world.world_size, dtype=recipe.compute_dtype, shard=shard
    )
    engine = build_engine(config, world=world, device=CPU)
    model = engine.construct(lambda: make_model(recipe, seed=seed), lambda: make_skeleton(recipe))
    record = Record(devices={n: p.device.type for n, p in model.named_parameters()})
    return engine, engine.prepare(model, make_optimizer(model)), record


def train(
    engine: Engine, model: nn.Module, record: Record, recipe: Recipe, world: RankInfo
) -> Record:
    """The loop of the protocol's docstring. Losses are this rank's share, normalised globally."""
    for step, window in enumerate(_batches(recipe)):
        tokens = sum(int((batch[:, 1:] != -100).sum()) for batch in window)
        total = 0.0
        for index, batch in enumerate(window):
            mine = batch.chunk(world.world_size)[world.rank]
            with engine.accumulating(last=index == len(window) - 1):
                with engine.autocast():
                    loss = _loss_sum(model, mine) * world.world_size / tokens
                if step == recipe.overflow_at and world.rank == world.world_size - 1:
                    loss = loss * float("inf")
                engine.backward(loss)
            total += float(loss.detach()) / world.world_size
        result = engine.step(1.0)
        engine.zero_grad()
        record.losses.append(total)
        record.norms.append(float(result.grad_norm))  # type: ignore[arg-type]
        record.skipped.append(result.skipped)
        record.scales.append(result.loss_scale)
    return record


def run(world: RankInfo, name: EngineName, recipe: Recipe, shard: int | None = None) -> Record:
    engine, model, record = prepare(name, recipe, world, shard=shard)
    train(engine, model, record, recipe, world)
    record.weights = dict(engine.full_weights())
    engine.close()
    return record


def _batches(recipe: Recipe) -> Iterator[list[Tensor]]:
    generator = torch.Generator().manual_seed(1)
    for step in range(recipe.steps):
        count = recipe.windows[step % len(recipe.windows)]
        if step == recipe.steps - 1 and recipe.short_last_window:
            count = recipe.short_last_window
        yield [_batch(recipe, generator) for _ in range(count)]


def _batch(recipe: Recipe, generator: torch.Generator) -> Tensor:
    tokens = torch.randint(1, VOCABULARY, (GLOBAL_BATCH, SEQUENCE), generator=generator)
    if recipe.uneven:
        lengths = torch.randint(3, SEQUENCE + 1, (GLOBAL_BATCH, 1), generator=generator)
        tokens = torch.where(torch.arange(SEQUENCE) < lengths, tokens, -100)
    return tokens


def _loss_sum(model: nn.Module, labels: Tensor) -> Tensor:
    logits = model(input_ids=labels.clamp(min=0)).logits.float()
    return nn.functional.cross_entropy(
        logits[:, :-1].reshape(-1, VOCABULARY), labels[:, 1:].reshape(-1), reduction="sum"
    )


class MemorySource:
    """A `StateSource` over whole tensors in memory, put together from all ranks' owned pieces."""

    def __init__(self, pieces: Sequence[LocalTensor], groups: Any) -> None:
        self.tensors: dict[tuple[str, str], Tensor] = {}
        self.covered: dict[tuple[str, str], Tensor] = {}
        self._kinds: dict[str, dict[str, torch.dtype]] = defaultdict(dict)
        self._groups = groups
        for piece in pieces:
            self._put(piece)

    @property
    def param_groups(self) -> Sequence[Mapping[str, Any]] | None:
        return self._groups  # type: ignore[no-any-return]

    def kinds(self, name: str) -> Mapping[str, torch.dtype]:
        return self._kinds.get(name, {})

    def shape(self, name: str, kind: str) -> tuple[int, ...]:
        return tuple(self.tensors[name, kind].shape)

    def read_into(self, name: str, kind: str, start: int, out: Tensor) -> None:
        out.copy_(self.tensors[name, kind].view(-1)[start : start + out.numel()])

    def _put(self, piece: LocalTensor) -> None:
        key = piece.name, piece.kind
        if key not in self.tensors:
            self.tensors[key] = torch.zeros(piece.shape, dtype=piece.data.dtype)
            self.covered[key] = torch.zeros(piece.shape, dtype=torch.int64)
        self._kinds[piece.name][piece.kind] = piece.data.dtype
        end = piece.start + piece.data.numel()
        self.tensors[key].view(-1)[piece.start : end] = piece.data
        self.covered[key].view(-1)[piece.start : end] += 1


def snapshot(engine: Engine, world: RankInfo) -> MemorySource:
    """The engine's whole state, on every rank."""
    owned = [
        dataclasses.replace(piece, data=piece.data.detach().clone())
        for piece in engine.local_state(optimizer=True)
        if piece.owned
    ]
    ranks: list[list[LocalTensor]] = [owned]
    if world.world_size > 1:
        ranks = [[]] * world.world_size
        dist.all_gather_object(ranks, owned)
    return MemorySource([piece for pieces in ranks for piece in pieces], engine.param_groups())
