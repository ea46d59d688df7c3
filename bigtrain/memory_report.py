"""A forecast in words, in a table of engines, and as JSON."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from bigtrain.memory.estimate import MemoryPlan
from bigtrain.memory.timeline import EVALUATION
from bigtrain.planning.engine_choice import Candidate, size
from bigtrain.planning.forecast import Forecast, Schedule, verdict

Row = tuple[str, ...]


def blocks(forecast: Forecast) -> Iterator[tuple[str, list[Row]]]:
    """Title and rows of what is to come."""
    yield "To come", list(_schedule_rows(forecast))
    if forecast.memory is None:
        yield "Memory", [("unknown", forecast.unknown)]
        return
    yield "Memory per rank", list(_memory_rows(forecast, forecast.memory))


def comparison(found: Sequence[tuple[Candidate, Forecast | None, str]]) -> list[Row]:
    """One row for each way to train, with what it would need; a header first."""
    header = ("engine", "weights", "masters", "gradients", "optimizer", "buffers", "activations")
    rows: list[Row] = [(*header, "peak", "")]
    for way, forecast, why in found:
        if forecast is None or forecast.memory is None:
            reason = why or (forecast.unknown if forecast else "")
            rows.append((str(way), *("–" for _ in range(7)), reason))
            continue
        rows.append((str(way), *_compared(forecast.memory), _short_verdict(forecast)))
    return rows


def as_json(forecast: Forecast) -> dict[str, Any]:
    """All figures in bytes, for programs."""
    memory, shapes = forecast.memory, forecast.model.shapes
    found: dict[str, Any] = {"schedule": asdict(forecast.schedule)}
    if shapes is not None:
        found["parameters"] = {
            "count": shapes.numel,
            "trained": shapes.trained_numel,
            "source": shapes.source,
        }
    if memory is None:
        return {**found, "memory": {"unknown": forecast.unknown}}
    found["memory"] = {
        "method": memory.method,
        "state": asdict(memory.state),
        "at_peak": memory.parts(),
        "activations": memory.activations,
        "logits": memory.logits,
        "unknown_optimizer": forecast.optimizer or None,
        "peak": memory.peak,
        "peak_moment": memory.peak_moment.name,
        "moments": [asdict(moment) for moment in memory.moments],
        "host": memory.host,
        "nvme": memory.nvme,
        "device": asdict(forecast.device_memory) | {"usable": forecast.device_memory.usable},
        "verdict": verdict(memory, forecast.device_memory),
    }
    if forecast.disk is not None:
        found["disk"] = asdict(forecast.disk) | {"peak": forecast.disk.peak}
    return found


def _schedule_rows(forecast: Forecast) -> Iterator[Row]:
    schedule, disk, shapes = forecast.schedule, forecast.disk, forecast.model.shapes
    if shapes is not None:
        frozen = shapes.trained_numel < shapes.numel
        trained = f", {_many(shapes.trained_numel)} trained" if frozen else ""
        yield "parameters", f"{_many(shapes.numel)}{trained} ({shapes.source})"
    yield "steps", _steps(schedule)
    if disk is None:
        return
    count = "" if schedule.checkpoints is None else f"{schedule.checkpoints:,} to come, "
    kept = "all of them" if disk.kept is None else disk.kept
    yield "checkpoints", f"{count}{size(disk.checkpoint)} each, {kept} kept"
    if disk.peak is None:
        yield "disk", "as many checkpoints as the data gives; training.save_total_limit bounds it"
        return
    yield "disk", f"{size(disk.peak)} at most, with the exported model ({size(disk.model)})"


def _steps(schedule: Schedule) -> str:
    if schedule.steps is None:
        return "as many as the data gives (training.num_train_epochs); it is counted when it runs"
    return f"{schedule.steps:,}, {_many(schedule.steps * schedule.tokens_per_step)} tokens at most"


def _memory_rows(forecast: Forecast, memory: MemoryPlan) -> Iterator[Row]:
    state, at = memory.state, memory.peak_moment
    yield "weights", size(state.weights)
    yield "masters", size(state.masters)
    yield "gradients", f"{size(state.gradients)} before the update"
    guessed = f", as Adam's: what {forecast.optimizer} keeps is not known"
    yield "optimizer", size(state.optimizer) + (guessed if forecast.optimizer else "")
    yield "communication", f"{size(state.buffers)} that stays, {size(at.communication)} at the peak"
    yield "activations", _activations(forecast, memory)
    yield "logits", size(memory.logits) if memory.logits else "in the activations"
    for moment in memory.moments:
        if moment.name == EVALUATION:
            batch = forecast.evaluation_batch
            yield "evaluation", f"{size(moment.activations)}, per_device_eval_batch_size {batch}"
    if memory.host:
        procs = forecast.procs_per_node
        each = f"{size(memory.host)} for each rank"
        yield "in host memory", f"{each}, {size(procs * memory.host)} on a node: offloaded"
    if memory.nvme:
        procs = forecast.procs_per_node
        yield "on NVMe", f"{size(memory.nvme)} for each rank, {size(procs * memory.nvme)} on a node"
    method = _method(forecast, memory)
    yield "peak", f"{size(memory.peak)}, {_moment(at.name)} (activations by {method})"
    judged = _judged(forecast)
    if judged:
        yield "margin", judged


def _method(forecast: Forecast, memory: MemoryPlan) -> str:
    if memory.method == "trace":
        at_evaluation = memory.peak_moment.name == EVALUATION
        return "formula, training's by trace" if at_evaluation else "trace"
    shapes = forecast.model.shapes
    known = shapes is None or shapes.architecture is None or shapes.architecture.is_measured
    return "formula" if known else "the formula for Llama's kin, for want of its own; use --trace"


def _activations(forecast: Forecast, memory: MemoryPlan) -> str:
    other = forecast.other_memory
    if other is None:
        return size(memory.activations)
    is_smaller = other.activations < memory.activations
    way = "with gradient_checkpointing" if is_smaller else "without gradient_checkpointing"
    return f"{size(memory.activations)}; {size(other.activations)} {way}, peak {size(other.peak)}"


def _moment(name: str) -> str:
    lasts = name == EVALUATION or name.startswith("backward")
    return f"in the {name}" if lasts else f"at the {name}"


def _judged(forecast: Forecast) -> str | None:
    memory, device = forecast.memory, forecast.device_memory
    if memory is None or device.total is None or device.usable is None:
        return None
    margin = device.usable - memory.peak
    of = f"of {size(device.total)} ({device.origin}; {size(device.reserve)} kept for libraries)"
    if margin >= 0:
        return f"{size(margin)} {of}: fits"
    if verdict(memory, device) == "tight":
        return f"{size(-margin)} into the reserve {of}: tight"
    return f"{size(-margin)} too much for {size(device.usable)} {of}: too large"


def _short_verdict(forecast: Forecast) -> str:
    memory, device = forecast.memory, forecast.device_memory
    if memory is None or device.usable is None:
        return ""
    judged, margin = verdict(memory, device), device.usable - memory.peak
    return f"fits, {size(margin)} left" if judged == "fits" else f"{judged}, {size(-margin)} over"


def _compared(memory: MemoryPlan) -> Row:
    state, at = memory.state, memory.peak_moment
    parts = (
        state.weights,
        state.masters,
        at.gradients,
        state.optimizer,
        state.buffers + at.communication,
        at.activations,
        memory.peak,
    )
    return tuple(size(part) if part else "–" for part in parts)


def _many(number: int) -> str:
    for unit, step in (("T", 10**12), ("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if number >= step:
            return f"{number / step:.3g} {unit}"
    return str(number)
