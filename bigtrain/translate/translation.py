"""The translation itself: values and an engine in; its config and the fate of every field out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any, Literal

from bigtrain.arguments.schema import Schema, load_schema
from bigtrain.errors import UnsupportedError
from bigtrain.topology import Topology
from bigtrain.translate import ddp, deepspeed, foreign, fsdp, precision, single
from bigtrain.translate.config import (
    ArgumentFate,
    DdpSettings,
    DeepSpeedSettings,
    DTypeName,
    EngineConfig,
    EngineName,
    EngineOptions,
    EngineSettings,
    Translation,
)
from bigtrain.translate.fates import FATES, refusals

Device = Literal["cpu", "cuda"]


@dataclass(frozen=True, kw_only=True)
class _Request:
    """All that the translators read."""

    values: Mapping[str, Any]
    said: Mapping[str, Any]
    """Those of them that were said."""
    topology: Topology
    on_cpu: bool
    compute: DTypeName
    options: EngineOptions
    said_options: EngineOptions
    """Without what given configs say."""
    hidden_size: int | None
    origins: Mapping[str, str]


def _zero(stage: Literal[1, 2, 3]) -> Callable[[_Request], EngineSettings]:
    def settings(request: _Request) -> EngineSettings:
        return deepspeed.settings(
            request.values,
            stage=stage,
            topology=request.topology,
            compute=request.compute,
            options=request.options,
            on_cpu=request.on_cpu,
            hidden_size=request.hidden_size,
        )

    return settings


_SETTINGS: Mapping[EngineName, Callable[[_Request], EngineSettings]] = {
    "single": lambda request: single.settings(),
    "ddp": lambda request: ddp.settings(request.values),
    "fsdp": lambda request: fsdp.settings(request.options, request.topology),
    "zero1": _zero(1),
    "zero2": _zero(2),
    "zero3": _zero(3),
}
_ON_DEEPSPEED = frozenset({"zero1", "zero2", "zero3"})
_SHARDED = _ON_DEEPSPEED | {"fsdp"}
_SHARDING_OPTIONS = (
    "shard",
    "cpu_offload",
    "reshard_after_forward",
    "wrap_classes",
    "forward_prefetch",
    "reduce_each_micro_batch",
    "reduce_dtype",
)
_NEED_THE_WHOLE_MODEL = ("bf16_full_eval", "fp16_full_eval", "jit_mode_eval", "torch_compile")


def topology_for(
    engine: EngineName, *, nodes: int = 1, procs_per_node: int = 1, shard: int | None = None
) -> Topology:
    """The shape of a run on `engine`: one copy of the model over `shard` ranks, or over all."""
    world_size = nodes * procs_per_node
    shard_size = (shard or world_size) if engine in _SHARDED else 1
    return Topology(nodes=nodes, procs_per_node=procs_per_node, shard_size=shard_size)


def translate(
    values: Mapping[str, Any],
    *,
    engine: EngineName,
    topology: Topology,
    device: Device,
    options: EngineOptions | None = None,
    hidden_size: int | None = None,
    origins: Mapping[str, str] | None = None,
) -> Translation:
    """What `engine` is told so that `values` hold, and what became of every argument.

    `values` are TrainingArguments fields; those left out have their defaults. They may come from
    a run file or from a live TrainingArguments. `options.shard` is already in `topology` (see
    `topology_for`). `hidden_size` sizes DeepSpeed's buckets. `origins` (`training.bf16` →
    `run.yaml:12`) tell where a value was said.

    Raises UnsupportedError that lists everything which can't be had, with its origin.
    """
    schema = load_schema()
    said = options or EngineOptions()
    options = foreign.merge(said, values)
    whole = {name: field.default for name, field in schema.items()} | {
        name: value.value if isinstance(value, Enum) else value for name, value in values.items()
    }
    request = _Request(
        values=whole,
        said=values,
        topology=topology,
        on_cpu=device == "cpu",
        compute=precision.compute_dtype(whole),
        options=options,
        said_options=said,
        hidden_size=hidden_size,
        origins=origins or {},
    )
    found = tuple(_faults(request, engine, schema))
    if found:
        raise UnsupportedError(with_origins(found, request.origins))
    ours = _SETTINGS[engine](request)
    open_ = tuple((f"training.{name}", why) for name, why in foreign.unresolved(ours, values))
    if open_:
        raise UnsupportedError(with_origins(open_, request.origins))
    masters = precision.master_dtype(whole, options.master_dtype)
    is_sharded = engine in _SHARDED
    config = EngineConfig(
        name=engine,
        settings=foreign.overlay(ours, values),
        compute_dtype=request.compute,
        master_dtype=masters,
        casts_weights=precision.casts_weights(whole) and not is_sharded,
        # Gradients of whole parameters are in the parameters' own precision.
        reduce_dtype=options.reduce_dtype or "fp32" if is_sharded else masters,
    )
    return Translation(engine=config, fates=_fates(config, schema, values))


def _faults(request: _Request, engine: EngineName, schema: Schema) -> Iterator[tuple[str, str]]:
    """(`section.key`, what is wrong and the fix), all of them."""
    values, options, topology = request.values, request.options, request.topology
    for name, why in refusals(values, schema):
        yield f"training.{name}", f"not supported: {why}"
    for name, why in precision.faults(
        values,
        on_deepspeed=engine in _ON_DEEPSPEED,
        on_cpu=request.on_cpu,
        masters=options.master_dtype,
    ):
        yield f"training.{name}", why
    for name, why in foreign.faults(
        values,
        engine=engine,
        topology=topology,
        options=request.said_options,
        origins=request.origins,
    ):
        yield f"training.{name}", why
    for name, why in foreign.batch_faults(request.said, topology):
        yield f"training.{name}", why
    backend = "gloo" if request.on_cpu else "nccl"
    if values["ddp_backend"] not in (None, backend):
        yield "training.ddp_backend", f"{values['ddp_backend']!r} is not {backend}; leave it out"
    yield from _fault_of_shape(request, engine)
    if engine == "single":
        for why in single.faults(topology):
            yield "engine.name", why
    if engine in _ON_DEEPSPEED:
        stage = int(engine[-1])
        for key, why in deepspeed.faults(options, topology, stage=stage, on_cpu=request.on_cpu):
            yield f"engine.{key}", why
    if options.cpu_offload and request.on_cpu and engine == "fsdp":
        yield "engine.cpu_offload", "a CPU has nowhere to offload to; leave it out"
    if engine not in _SHARDED:
        for key in _SHARDING_OPTIONS:
            if getattr(options, key) is not None:
                yield f"engine.{key}", f"{engine} does not shard; leave it out, or use engine fsdp"
    if engine not in _ON_DEEPSPEED:
        for key in deepspeed.ZERO_ONLY:
            if getattr(options, key) is not None:
                yield f"engine.{key}", f"{engine} has no such option; leave it out, or use zero3"


def _fault_of_shape(request: _Request, engine: EngineName) -> Iterator[tuple[str, str]]:
    """Arguments that ask for what this engine or this number of nodes can't give."""
    for name in _NEED_THE_WHOLE_MODEL if engine in _SHARDED else ():
        if request.values[name]:
            yield (
                f"training.{name}",
                f"not supported on {engine}, where no rank has the whole model; "
                "leave it out, or use engine single or ddp",
            )


def with_origins(faults: Iterable[tuple[str, str]], origins: Mapping[str, str]) -> tuple[str, ...]:
    """(dotted key, what is wrong) as messages, which begin with where the key was said."""
    return tuple(
        f"{origins[key]}: {key}: {why}" if key in origins else f"{key}: {why}"
        for key, why in faults
    )


def _fates(
    config: EngineConfig, schema: Schema, said: Mapping[str, Any]
) -> tuple[ArgumentFate, ...]:
    mapped = _mapped(config.settings)
    unread = {name: "; ".join(keys) for name, keys in foreign.without_effect(said).items() if keys}
    return tuple(
        ArgumentFate(argument=name, fate="mapped", detail=mapped[name])
        if name in mapped
        else _ruled(name, unread=unread.get(name))
        for name in schema
    )


def _mapped(settings: EngineSettings) -> Mapping[str, str]:
    if isinstance(settings, DdpSettings):
        return ddp.mapped(settings)
    if isinstance(settings, DeepSpeedSettings):
        return deepspeed.mapped(settings)
    return {}


def _ruled(name: str, *, unread: str | None) -> ArgumentFate:
    """`unread`: the keys inside of it from which nothing comes."""
    rule = FATES.get(name)
    if rule is None or rule.fate == "refused":
        # What differs from its default was refused before this; so nothing was asked for.
        why = rule.detail if rule else "bigtrain does not know it yet"
        return ArgumentFate(
            argument=name, fate="no_effect", detail=f"at its default; else refused: {why}"
        )
    detail = f"{rule.detail}; without effect in it: {unread}" if unread else rule.detail
    return ArgumentFate(argument=name, fate=rule.fate, detail=detail)
