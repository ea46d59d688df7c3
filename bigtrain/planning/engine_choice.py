"""`engine: auto`: the fastest engine whose memory fits, with the least sharding and offload first.

What comes earlier moves less data in each step: a whole copy on every rank, then optimizer state,
gradients and weights cut over the ranks (first within a node, whose links are fast), and at last
the host's memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from bigtrain.memory.estimate import MemoryPlan
from bigtrain.planning.device_memory import DeviceMemory
from bigtrain.translate.config import EngineName


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One way to train: engine options by their keys in a run file."""

    engine: EngineName
    options: tuple[tuple[str, object], ...] = ()

    def __str__(self) -> str:
        shown = ", ".join(key if value is True else f"{key} {value}" for key, value in self.options)
        return f"{self.engine} ({shown})" if shown else self.engine


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The candidate that was taken, and why."""

    candidate: Candidate
    why: str


def candidates(
    *, nodes: int, procs_per_node: int, on_gpu: bool, accumulates: bool = False
) -> Iterator[Candidate]:
    """From the fastest to the one that needs the least memory."""
    world = nodes * procs_per_node
    yield Candidate(engine="single") if world == 1 else Candidate(engine="ddp")
    if world > 1:
        yield Candidate(engine="zero1")
        yield Candidate(engine="zero2")
        if nodes > 1 and procs_per_node > 1:
            yield Candidate(engine="fsdp", options=(("shard", procs_per_node),))
        yield Candidate(engine="fsdp")
        if accumulates:
            yield Candidate(engine="fsdp", options=(("reduce_each_micro_batch", True),))
        # It cuts inside of a parameter, where FSDP cuts along the first dimension alone: a layer's
        # experts, in one tensor, spread over no more ranks than there are experts.
        yield Candidate(engine="zero3")
    if on_gpu:
        yield Candidate(engine="zero3", options=(("offload_optimizer", "cpu"),))
        offload = (("offload_optimizer", "cpu"), ("offload_parameters", "cpu"))
        yield Candidate(engine="zero3", options=offload)


def choose(
    ways: list[Candidate],
    *,
    memory_of: Callable[[Candidate], MemoryPlan | None],
    device_memory: DeviceMemory,
) -> Choice | None:
    """The first that fits; the smallest where none does; None where nothing is known of memory."""
    if device_memory.usable is None:
        return None
    passed: list[tuple[bool, int, Candidate]] = []
    for way in ways:
        memory = memory_of(way)
        if memory is None:
            return None
        need = f"{size(memory.peak)} of {size(device_memory.usable)} usable"
        is_held = device_memory.holds_offloaded(memory.host)
        if memory.peak <= device_memory.usable and is_held:
            names = ", ".join(str(other) for *_, other in passed)
            before = f"; {names} would not fit" if passed else ""
            host = f", and {size(memory.host)} of the host's memory" if memory.host else ""
            return Choice(candidate=way, why=f"auto: the fastest that fits, {need}{host}{before}")
        passed.append((not is_held, memory.peak, way))
    _, least, way = min(passed, key=lambda entry: entry[:2])
    why = f"auto: nothing fits {size(device_memory.usable)}; this needs the least, {size(least)}"
    return Choice(candidate=way, why=why)


def size(number: int) -> str:
    """Bytes for people."""
    for unit, step in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20)):
        if number >= step:
            return f"{number / step:.1f} {unit}"
    return f"{number / 1024:.0f} KiB"
