"""Runs of one small training on every engine and size, saved by some and gone on from by others.

A Llama with a frozen layer, or one with low-rank adapters beside frozen weights; two parameter
groups, AdamW, a learning rate that changes, twelve sequences a step.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bigtrain.checkpoint.load import group_names, open_checkpoint, restore
from bigtrain.checkpoint.manifest import Progress
from bigtrain.checkpoint.save import save_checkpoint
from bigtrain.engine import build_engine
from bigtrain.engine.protocol import Engine
from bigtrain.topology import RankInfo
from bigtrain.translate.config import DTypeName, EngineName, EngineOptions
from tests.engine import recipes
from tests.engine.recipes import Recipe

GLOBAL_BATCH = 12
SAVED_AT = 3
STEPS = 5
RECIPE = Recipe(frozen=("layers.0.mlp",))


@dataclass(frozen=True)
class Case:
    """One engine at one size."""

    engine: EngineName
    world_size: int
    shard: int | None = None
    dtype: DTypeName = "fp32"
    has_adapters: bool = False
    offloads: bool = False

    def __str__(self) -> str:
        parts = [self.engine + ("-offload" if self.offloads else ""), str(self.world_size)]
        parts += [f"shard{self.shard}"] if self.shard else []
        parts += [self.dtype] if self.dtype != "fp32" else []
        parts += ["lora"] if self.has_adapters else []
        return "-".join(parts)


@dataclass(frozen=True)
class Ran:
    """What rank 0 knows of a run."""

    tensors: dict[tuple[str, str], Tensor]
    groups: list[dict[str, Any]]
    losses: list[float]
    scale: dict[str, Any]


class Adapted(nn.Module):
    """A frozen linear layer with a trained low-rank addition."""

    def __init__(self, base: nn.Linear, rank: int = 3) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        device = base.weight.device
        self.down = nn.Parameter(torch.randn(rank, base.in_features, device=device) * 0.1)
        self.up = nn.Parameter(torch.zeros(base.out_features, rank, device=device))

    def forward(self, inputs: Tensor) -> Tensor:
        return self.base(inputs) + inputs @ self.down.T @ self.up.T  # type: ignore[no-any-return]


def make_model(case: Case, *, seed: int, on_meta: bool = False) -> nn.Module:
    model = recipes.make_skeleton(RECIPE) if on_meta else recipes.make_model(RECIPE, seed=seed)
    if case.has_adapters:
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        for layer in model.model.layers:  # type: ignore[union-attr]
            layer.self_attn.q_proj = Adapted(layer.self_attn.q_proj)
            layer.self_attn.v_proj = Adapted(layer.self_attn.v_proj)
    return model


def make_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    plain = [name for name in trained if trained[name].ndim <= 1 or name.endswith(".up")]
    groups = [
        {"params": [p for n, p in trained.items() if n not in plain], "weight_decay": 0.1},
        {"params": [trained[name] for name in plain], "weight_decay": 0.0, "lr": 3e-3},
    ]
    return torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95))


def prepare(case: Case, world: RankInfo, *, seed: int) -> tuple[Engine, nn.Module]:
    config = recipes.engine_config(
        case.engine,
        world_size=world.world_size,
        dtype=case.dtype,
        shard=case.shard,
        options=EngineOptions(offload_optimizer="cpu" if case.offloads else None),
    )
    engine = build_engine(config, world=world, device=recipes.CPU)
    model = engine.construct(
        lambda: make_model(case, seed=seed), lambda: make_model(case, seed=seed, on_meta=True)
    )
    return engine, engine.prepare(model, make_optimizer(model))


def batches() -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(1)
    while True:
        yield torch.randint(
            1, recipes.VOCABULARY, (GLOBAL_BATCH, recipes.SEQUENCE), generator=generator
        )


def train(
    engine: Engine, model: nn.Module, world: RankInfo, *, first: int, last: int
) -> list[float]:
    """Steps [first, last) of the run; the global loss of each, before its update."""
    losses = []
    for step, batch in zip(range(last), batches(), strict=False):
        if step < first:
            continue
        tokens = batch[:, 1:].numel()
        mine = batch.chunk(world.world_size)[world.rank]
        with engine.accumulating(last=True):
            with engine.autocast():
                loss = recipes._loss_sum(model, mine) * world.world_size / tokens
            engine.backward(loss)
        total = loss.detach().double() / world.world_size
        if world.world_size > 1:
            torch.distributed.all_reduce(total)
        losses.append(float(total))
        engine.step(1.0)
        engine.zero_grad()
        for group in engine.optimizer.param_groups:  # type: ignore[union-attr]
            group["lr"] *= 0.9
    return losses


def target_of(output_dir: Path, case: Case) -> Path:
    return output_dir / str(case) / f"checkpoint-{SAVED_AT}"


def write(world: RankInfo, case: Case, output_dir: Path) -> Ran:
    """Train, save, and go on."""
    engine, model = prepare(case, world, seed=0)
    train(engine, model, world, first=0, last=SAVED_AT)
    save_checkpoint(
        target_of(output_dir, case),
        engine=engine,
        world=world,
        run_id=str(case),
        progress=Progress(step=SAVED_AT, global_batch_size=GLOBAL_BATCH),
        scheduler_state={"last_epoch": SAVED_AT},
        rng_state={"cpu": torch.random.get_rng_state()},
        write_files=lambda staging: write_model(engine, staging),
    )
    ran = _ran(engine, world)
    losses = train(engine, model, world, first=SAVED_AT, last=STEPS)
    engine.close()
    return Ran(tensors=ran.tensors, groups=ran.groups, losses=losses, scale=ran.scale)


def read(world: RankInfo, case: Case, checkpoint: Path) -> Ran:
    """Begin as another model, load, and go on."""
    engine, model = prepare(case, world, seed=7)
    with open_checkpoint(checkpoint, names=group_names(engine)) as loaded:
        restore(engine, loaded, world=world)
        engine.load_scaler_state(loaded.scaler_state())
    ran = _ran(engine, world)
    losses = train(engine, model, world, first=SAVED_AT, last=STEPS)
    engine.close()
    return Ran(tensors=ran.tensors, groups=ran.groups, losses=losses, scale=ran.scale)


def _ran(engine: Engine, world: RankInfo) -> Ran:
    state = recipes.snapshot(engine, world)
    return Ran(
        tensors=state.tensors if world.is_main else {},
        groups=[group for group in engine.param_groups() if group["params"]],
        losses=[],
        scale=engine.scaler_state(),
    )


def write_model(engine: Engine, staging: Path) -> None:
    from safetensors.torch import save_file

    if not engine.is_sharded:
        weights = {name: value for name, value in engine.full_weights() if value is not None}
        save_file(weights, staging / "model.safetensors", metadata={"format": "pt"})
