"""This process among the others, under the names that accelerate has for it."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from accelerate.state import PartialState
from accelerate.utils import DistributedType

from bigtrain.engine.protocol import Engine
from bigtrain.topology import RankInfo
from bigtrain.trainer import collectives

_Function = Callable[..., Any]


def tell_accelerate(ranks: RankInfo, device: torch.device) -> None:
    """Let accelerate's own functions and loggers, which scripts call too, know this process's
    place. By itself `PartialState` asks the environment, and on a CPU takes each rank as alone."""
    known: Any = PartialState._shared_state
    place = {"num_processes": ranks.world_size, "process_index": ranks.rank}
    if place.items() <= known.items():
        return  # the script has made it
    known.update(
        place,
        local_process_index=ranks.local_rank,
        distributed_type=_distributed_type(ranks, device),
        backend=dist.get_backend() if ranks.world_size > 1 else None,
        device=device,
        debug=False,
        fork_launched=False,
        _cpu=device.type == "cpu",
    )


class Processes:
    """Who this process is, and what it does alone, first or together with the others."""

    ranks: RankInfo
    engine: Engine
    _is_triggered = False

    @property
    def device(self) -> torch.device:
        return self.engine.device

    @property
    def num_processes(self) -> int:
        return self.ranks.world_size

    @property
    def process_index(self) -> int:
        return self.ranks.rank

    @property
    def local_process_index(self) -> int:
        return self.ranks.local_rank

    @property
    def is_main_process(self) -> bool:
        return self.ranks.is_main

    @property
    def is_local_main_process(self) -> bool:
        return self.ranks.is_local_main

    @property
    def is_last_process(self) -> bool:
        return self.ranks.rank == self.ranks.world_size - 1

    @property
    def use_distributed(self) -> bool:
        return self.ranks.world_size > 1

    @property
    def backend(self) -> str | None:
        """Of the process group; None where a process is alone."""
        return str(dist.get_backend()) if self.use_distributed else None

    @property
    def multi_device(self) -> bool:
        return self.use_distributed

    @property
    def distributed_type(self) -> DistributedType:
        """As of a plain data-parallel run: what differs between engines is theirs alone."""
        return _distributed_type(self.ranks, self.device)

    # ---- One of them ----

    def on_main_process(self, function: _Function) -> _Function:
        """A function that does nothing on other processes than the first."""
        return _only(function, lambda: self.is_main_process)

    def on_local_main_process(self, function: _Function) -> _Function:
        return _only(function, lambda: self.is_local_main_process)

    def on_last_process(self, function: _Function) -> _Function:
        return _only(function, lambda: self.is_last_process)

    def on_process(
        self, function: _Function | None = None, process_index: int | None = None
    ) -> _Function:
        if function is None:
            return functools.partial(self.on_process, process_index=process_index)
        return _only(function, lambda: self.process_index == process_index)

    def on_local_process(
        self, function: _Function | None = None, local_process_index: int | None = None
    ) -> _Function:
        if function is None:
            return functools.partial(self.on_local_process, local_process_index=local_process_index)
        return _only(function, lambda: self.local_process_index == local_process_index)

    def print(self, *values: Any, **kwargs: Any) -> None:
        if self.is_local_main_process:
            print(*values, **kwargs)  # noqa: T201 (it is accelerate's print)

    # ---- In turn ----

    @contextlib.contextmanager
    def main_process_first(self) -> Iterator[None]:
        """The first process, then the others. All processes enter."""
        with _first(self.is_main_process):
            yield

    @contextlib.contextmanager
    def local_main_process_first(self) -> Iterator[None]:
        """The first process of every node, then the others."""
        with _first(self.is_local_main_process):
            yield

    def wait_for_everyone(self) -> None:
        collectives.barrier()

    # ---- Together ----

    def split_between_processes(
        self, inputs: Any, apply_padding: bool = False
    ) -> contextlib.AbstractContextManager[Any]:
        """This process's share of a list, tuple, dict, tensor or dataset."""
        split: Any = PartialState.split_between_processes  # it asks only for place and device
        return split(self, inputs, apply_padding=apply_padding)  # type: ignore[no-any-return]

    def set_trigger(self) -> None:
        """Let `check_trigger` be true once, on every process."""
        self._is_triggered = True

    def check_trigger(self) -> bool:
        """Whether any process has set the trigger. All processes call it."""
        is_set = collectives.total(float(self._is_triggered), device=self.device) > 0
        if is_set:
            self._is_triggered = False
        return is_set


def _distributed_type(ranks: RankInfo, device: torch.device) -> DistributedType:
    if ranks.world_size == 1:
        return DistributedType.NO
    return DistributedType.MULTI_CPU if device.type == "cpu" else DistributedType.MULTI_GPU


def _only(function: _Function, is_meant: Callable[[], bool]) -> _Function:
    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs) if is_meant() else None

    return wrapped


@contextlib.contextmanager
def _first(is_first: bool) -> Iterator[None]:
    if not is_first:
        collectives.barrier()
    try:
        yield
    finally:
        if is_first:
            collectives.barrier()
