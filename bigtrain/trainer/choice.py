"""Which engine trains: as the plan says, else as the arguments ask, else as many processes need."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import transformers

from bigtrain.plan import RunPlan
from bigtrain.topology import RankInfo
from bigtrain.trainer.arguments import TrainingArguments
from bigtrain.translate import foreign, translation
from bigtrain.translate.config import DeepSpeedSettings, EngineConfig, EngineName


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
    nodes = max(1, args.world_size // args.ranks.local_world_size)
    topology = (
        plan.topology
        if plan is not None
        else translation.topology_for(name, nodes=nodes, procs_per_node=args.world_size // nodes)
    )
    translated = translation.translate(
        values, engine=name, topology=topology, device=device, hidden_size=hidden_size
    ).engine
    if plan is None or not _has_engine_options(plan):
        return translated
    # A script's arguments give the values; what the launcher was told of the engine stays.
    return dataclasses.replace(plan.engine, **_precision_and_values(plan.engine, translated))


def _has_engine_options(plan: RunPlan) -> bool:
    """Whether the launcher was told more of the engine than its name."""
    return any(key.startswith("engine.") and key != "engine.name" for key in plan.origins)


def argument_values(args: TrainingArguments) -> dict[str, Any]:
    """The arguments as a run file would hold them. Fields of a user's subclass are his own."""
    names = {field.name for field in dataclasses.fields(TrainingArguments) if field.init}
    return {name: getattr(args, name) for name in sorted(names)}


def adopt(
    args: transformers.TrainingArguments, kind: type[TrainingArguments] = TrainingArguments
) -> TrainingArguments:
    """`args` as bigtrain's class `kind`, for a script that has kept transformers' import."""
    if isinstance(args, kind):
        return args
    if type(args) is not getattr(transformers, kind.__name__):
        raise TypeError(
            f"args is a {type(args).__name__}, which does not extend bigtrain.{kind.__name__}; "
            "change its base class"
        )
    fields = [field.name for field in dataclasses.fields(args) if field.init]
    return kind(**{name: getattr(args, name) for name in fields})


def _asked(values: Mapping[str, Any], ranks: RankInfo) -> EngineName:
    return foreign.asked_engine(values) or ("ddp" if ranks.world_size > 1 else "single")


def _precision_and_values(planned: EngineConfig, translated: EngineConfig) -> dict[str, Any]:
    changed: dict[str, Any] = {"compute_dtype": translated.compute_dtype}
    if isinstance(planned.settings, DeepSpeedSettings):
        assert isinstance(translated.settings, DeepSpeedSettings)
        changed["settings"] = _with_options(translated.settings, planned.settings)
    return changed


# What was asked of the engine by the launcher, and what TrainingArguments have no word for.
_ZERO_OPTIONS = (
    "offload_optimizer",
    "offload_param",
    "zero_hpz_partition_size",
    "zero_quantized_weights",
    "zero_quantized_gradients",
)


def _with_options(values: DeepSpeedSettings, planned: DeepSpeedSettings) -> DeepSpeedSettings:
    """The script's values, with the launcher's options."""
    zero = planned.json["zero_optimization"]
    options = {key: zero[key] for key in _ZERO_OPTIONS if key in zero}
    own = {"communication_data_type": planned.json["communication_data_type"]}
    if "aio" in planned.json:
        own["aio"] = planned.json["aio"]
    section = {**values.json["zero_optimization"], **options}
    return dataclasses.replace(values, json={**values.json, **own, "zero_optimization": section})
