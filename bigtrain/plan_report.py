"""A plan in words: what will run, with which values, and where each of them was said."""

from __future__ import annotations

import dataclasses
import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from bigtrain import memory_report
from bigtrain.arguments.schema import defaults, load_schema
from bigtrain.plan import RunPlan
from bigtrain.planning.forecast import Forecast
from bigtrain.printable import printable
from bigtrain.translate.accelerate_environment import SAID_BY_SCRIPT
from bigtrain.translate.config import DeepSpeedSettings

_LONGEST_VALUE = 60


def report(
    plan: RunPlan,
    forecast: Forecast | None = None,
    *,
    missing: Sequence[str] = (),
    refused: Sequence[str] = (),
    shows_all: bool = False,
) -> str:
    """The plan for people: processes, values with their origins, the engine, memory and disk as
    far as they are forecast, and the fate of what is not at its default.

    `missing`: what the run file names and is not on this machine. `refused`: why a launch would
    be. `shows_all`: what is at its default as well.
    """
    blocks: list[tuple[str, list[tuple[str, ...]]]] = [
        ("Run", _run_rows(plan)),
        *(memory_report.blocks(forecast) if forecast else ()),
        ("Launch will refuse it", [(what,) for what in refused]),
        ("Missing on this machine", [(what,) for what in missing]),
        ("Values", _value_rows(plan)),
        ("Engine", _engine_rows(plan)),
        ("Arguments", _fate_rows(plan, shows_all=shows_all)),
    ]
    return "\n\n".join(f"{title}\n{table(rows)}" for title, rows in blocks if rows)


def _run_rows(plan: RunPlan) -> list[tuple[str, ...]]:
    topology = plan.topology
    rows: list[tuple[str, ...]] = [
        ("name", f"{plan.name}, attempt {plan.attempt}"),
        (plan.kind.replace("_", " "), shlex.join((plan.source, *plan.script_args))),
        ("output", _output(plan)),
        ("processes", _processes(plan)),
        ("start", plan.start_method + (f": {plan.start_reason}" if plan.start_reason else "")),
        ("resume", plan.resume),
    ]
    micro_batch = _argument(plan, "per_device_train_batch_size")
    accumulation = _argument(plan, "gradient_accumulation_steps")
    if plan.kind == "run_file":
        batch = _global_batch(plan)
        cut = f"{micro_batch} × {accumulation} micro-batches × {topology.world_size} processes"
        rows.append(("global batch", f"{batch} sequences = {cut}"))
        tokens = batch * int(plan.data["sequence_length"])
        rows.append(("tokens a step", f"{tokens:,} at most"))
    return rows


def _global_batch(plan: RunPlan) -> int:
    micro_batch = _argument(plan, "per_device_train_batch_size")
    return micro_batch * _argument(plan, "gradient_accumulation_steps") * plan.topology.world_size


def _output(plan: RunPlan) -> str:
    said = plan.origins.get("output_dir")
    return f"{plan.output_dir} ({said})" if said and plan.kind == "script" else plan.output_dir


def _fate_rows(plan: RunPlan, *, shows_all: bool) -> list[tuple[str, ...]]:
    """Argument, value, fate, and in a few words by what, from what, or why."""
    values = defaults(load_schema())
    found = values | dict(plan.training)
    rows: list[tuple[str, ...]] = [
        (fate.argument, short(found.get(fate.argument)), fate.fate, fate.detail)
        for fate in plan.fates
        if shows_all or found.get(fate.argument) != values.get(fate.argument)
    ]
    others = len(plan.fates) - len(rows)
    if others:
        rows.append((f"{others} others", "", "", "at their defaults; --all shows them"))
    return rows


def _processes(plan: RunPlan) -> str:
    topology, threads = plan.topology, plan.threads_per_rank
    nodes = f"{topology.nodes} nodes × " if topology.nodes > 1 else ""
    spread = f", {topology.replicate_size} replicas" if topology.replicate_size > 1 else ""
    return (
        f"{nodes}{topology.procs_per_node} on {plan.device}, "
        f"{threads} thread{'s' if threads > 1 else ''} each{spread}"
    )


def _argument(plan: RunPlan, name: str) -> int:
    value = plan.training.get(name)
    return int(load_schema()[name].default if value is None else value)


def _value_rows(plan: RunPlan) -> list[tuple[str, ...]]:
    sections = {
        "model": plan.model,
        "tokenizer": plan.tokenizer,
        "data": plan.data,
        "training": plan.training,
        "engine": {"name": plan.engine.name, **_said_options(plan)},
        "cluster": {
            "nodes": plan.topology.nodes,
            "procs_per_node": plan.topology.procs_per_node,
            "max_restarts": plan.max_restarts,
            "env": plan.environment,
        },
    }
    rows: list[tuple[str, ...]] = [
        (key, short(value), origin(plan, key))
        for name, section in sections.items()
        for key, value in leaves(name, section)
    ]
    said = plan.origins.get("global_batch_size")
    if said is None or plan.kind == "script":
        return rows
    return [("global_batch_size", str(_global_batch(plan)), said), *rows]


def _said_options(plan: RunPlan) -> dict[str, Any]:
    options = dataclasses.asdict(plan.options)
    return {key: value for key, value in options.items() if value is not None}


def origin(plan: RunPlan, key: str) -> str:
    """Where a value was said: at its own key, or as part of what is around it."""
    while key:
        if key in plan.origins and "." in key:
            return plan.origins[key]
        key = key.rpartition(".")[0]
    return "default"


def _engine_rows(plan: RunPlan) -> list[tuple[str, ...]]:
    engine = plan.engine
    said = _as_the_script_says(plan)
    rows: list[tuple[str, ...]] = [("engine", engine.name), ("precision", _precision(plan, said))]
    settings: Mapping[str, Any] = (
        engine.settings.json
        if isinstance(engine.settings, DeepSpeedSettings)
        else dataclasses.asdict(engine.settings)
    )
    return rows + [
        (key, "as the script says" if key in said else short(value))
        for key, value in leaves("", settings)
    ]


def _precision(plan: RunPlan, said_by_script: set[str]) -> str:
    """accelerate's FSDP reduces gradients in what computes (FullyShardedDataParallelPlugin,
    `set_mixed_precision`)."""
    engine = plan.engine
    if "bf16.enabled" in said_by_script:
        return f"computes as the script says, masters {engine.master_dtype}"
    precision = f"{engine.compute_dtype}, masters {engine.master_dtype}"
    if engine.name == "single":
        return precision
    is_accelerate_s = plan.kind == "script" and "ACCELERATE_USE_FSDP" in plan.environment
    reduce = engine.compute_dtype if is_accelerate_s else engine.reduce_dtype
    return f"{precision}, reduced in {reduce}"


def _as_the_script_says(plan: RunPlan) -> set[str]:
    """Settings that a script fills itself, with its own arguments."""
    if plan.kind == "run_file":
        return set()
    said = {key for key, argument in SAID_BY_SCRIPT.items() if argument not in plan.training}
    if not {"bf16", "fp16"} & set(plan.training):
        said |= {"bf16.enabled", "fp16.enabled"}
    return said | {"train_batch_size"}


def leaves(prefix: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Dotted key and value of everything in a tree of mappings."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from leaves(f"{prefix}.{key}" if prefix else key, inner)
    else:
        yield prefix, value


def short(value: Any) -> str:
    """A value on one line, cut where it is long."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _LONGEST_VALUE else text[: _LONGEST_VALUE - 1] + "…"


def table(rows: list[tuple[str, ...]]) -> str:
    """Rows in columns, the last of them ragged."""
    rows = [tuple(map(printable, row)) for row in rows]
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    padded = ([cell.ljust(w) for cell, w in zip(row, widths, strict=True)] for row in rows)
    return "\n".join(f"  {'  '.join(cells)}".rstrip() for cells in padded)
