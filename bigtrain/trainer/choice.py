"""Which engine trains: as the plan says, else as the arguments ask, else as many processes need."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from bigtrain.plan import RunPlan
from bigtrain.topology import RankInfo, Topology
from bigtrain.trainer.arguments import TrainingArguments
from bigtrain.translate import foreign, translation
from bigtrain.translate.config import EngineConfig, EngineName


def engine_config(
    args: TrainingArguments, *, plan: RunPlan | None, hidden_size: int | None
) -> EngineConfig:
    """The engine's config, with what the arguments ask of it. Raises UnsupportedError."""
    if plan is not None and plan.kind == "run_file":
        return plan.engine
    values = argument_values(args)
    name = plan.engine.name if plan is not None else _asked(values, args.ranks)
    on_gpu = args.device.type == "cuda"
    device: Literal["cpu", "cuda"] = "cuda" if on_gpu else "cpu"
    topology = plan.topology if plan is not None else _topology(name, args, values)
    return translation.translate(
        values,
        engine=name,
        topology=topology,
        device=device,
        options=plan.options if plan is not None else None,
        hidden_size=hidden_size,
        origins=plan.origins if plan is not None else None,
    ).engine


def _topology(name: EngineName, args: TrainingArguments, values: Mapping[str, Any]) -> Topology:
    procs = args.ranks.local_world_size
    nodes = max(1, args.world_size // procs)
    procs = args.world_size // nodes
    shard = procs if foreign.shards_by_node(values) else None
    return translation.topology_for(name, nodes=nodes, procs_per_node=procs, shard=shard)


def argument_values(args: TrainingArguments) -> dict[str, Any]:
    """The arguments as a run file would hold them. Fields of a user's subclass are his own."""
    names = {field.name for field in dataclasses.fields(TrainingArguments) if field.init}
    return {name: getattr(args, name) for name in sorted(names)}


def _asked(values: Mapping[str, Any], ranks: RankInfo) -> EngineName:
    return foreign.asked_engine(values) or ("ddp" if ranks.world_size > 1 else "single")
