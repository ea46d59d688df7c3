"""Saves checkpoints: copy out, write, commit.

    take_snapshot   what this rank writes, of the live state                      every rank
    write_share     shards and small files into the staging, hashed               every rank
    commit          metadata, manifest, rename                                    rank 0

`save_checkpoint` does all of it at once. A `Saver` does the last two in a process beside each
rank, so that training waits only until its state is copied. A failure of any rank ends the save on
all ranks with the same error; the staging is removed, and no earlier checkpoint was touched.
"""

from __future__ import annotations

import logging
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bigtrain.checkpoint import arena
from bigtrain.checkpoint import staging as stagings
from bigtrain.checkpoint.agreement import attempt, gather, gather_all, on_main
from bigtrain.checkpoint.background import BackgroundWriter
from bigtrain.checkpoint.commit import (
    Destination,
    commit,
    commit_on_node,
    files_in,
    parts_here,
    versions_of,
    write_share,
)
from bigtrain.checkpoint.manifest import Manifest, NodeOfCheckpoint, Progress
from bigtrain.checkpoint.node_agreement import are_apart, job_nodes
from bigtrain.checkpoint.snapshot import Snapshot, live_memory, take_snapshot
from bigtrain.checkpoint.writer import Order
from bigtrain.engine.protocol import Engine
from bigtrain.errors import CheckpointError
from bigtrain.topology import RankInfo

logger = logging.getLogger(__name__)

FAILED = 1 << 20
"""Weight of a failure in the status that ranks sum: above any number of ranks."""
COMMITTED = 1


@dataclass(frozen=True, kw_only=True)
class SaveRequest:
    """What is to be saved, and where. The same on all ranks but for `rng_state`."""

    target: Path
    run_id: str
    progress: Progress
    scheduler_state: Mapping[str, Any] | None
    rng_state: Mapping[str, Any] | None
    """Each rank's own."""
    write_files: Callable[[Path], None]
    """`write_files(staging)` adds the caller's files, on rank 0 alone and so without collectives:
    on an engine that doesn't shard, `model.safetensors` is one of them."""
    only_model: bool = False
    """Leave out optimizer, scheduler, scaler and random state."""
    check_place: Callable[[], None] = lambda: None
    """Raises CheckpointError, on rank 0, where this run may not write any more."""


def save_checkpoint(
    target: Path,
    *,
    engine: Engine,
    world: RankInfo,
    run_id: str,
    progress: Progress,
    scheduler_state: Mapping[str, Any] | None,
    rng_state: Mapping[str, Any] | None,
    write_files: Callable[[Path], None],
    only_model: bool = False,
) -> None:
    """Commit the training state as the directory `target`: see `SaveRequest`. All ranks call.

    Raises CheckpointError, on all ranks or on none.
    """
    request = SaveRequest(
        target=target,
        run_id=run_id,
        progress=progress,
        scheduler_state=scheduler_state,
        rng_state=rng_state,
        write_files=write_files,
        only_model=only_model,
    )
    Saver(world, in_background=False).save(request, engine)


@dataclass(frozen=True, kw_only=True)
class InFlight:
    """A save that is being written while training goes on."""

    target: Path
    progress: Progress


class Saver:
    """One rank's part in saving; all ranks make one and call its methods in the same order."""

    def __init__(self, world: RankInfo, *, in_background: bool, on_each_node: bool = False) -> None:
        self._world = world
        self._wants_each_node = on_each_node
        self._nodes: tuple[NodeOfCheckpoint, ...] | None = None
        self._destination: Destination | None = None
        self._wants_background = in_background and arena.is_supported()
        self._writer: BackgroundWriter | None = None
        self.in_flight: InFlight | None = None

    def warm_up(self, engine: Engine) -> None:
        """Start the process, and have memory made ready for weights and two moments of each."""
        if self._wants_background and self._writer is None:
            self._writer = BackgroundWriter()
            weights = sum(t.data.nbytes for t in engine.local_state(optimizer=False) if t.owned)
            nbytes = 3 * weights
            if nbytes < arena.available_bytes() // (2 * self._world.local_world_size):
                self._writer.prepare(nbytes)

    def save(self, request: SaveRequest, engine: Engine, *, wait: bool = True) -> None:
        """Save; without `wait`, return once the state is copied, and be `in_flight` then.

        One that is in flight is waited for first. Raises CheckpointError on all ranks or on none.
        """
        self.finish()
        world = self._world
        nodes = self._find_nodes(request.target.parent)
        snapshot = attempt(
            world,
            lambda: take_snapshot(
                engine,
                world=world,
                scheduler_state=request.scheduler_state,
                rng_state=request.rng_state,
                only_model=request.only_model,
                on_each_node=bool(nodes),
            ),
        )
        destination = self._open(request, snapshot, engine, nodes)
        try:
            self._write(request, snapshot, destination, wait=wait)
        except BaseException:
            if snapshot.is_head:
                stagings.discard(destination.staging)
            raise

    def status(self) -> int:
        """Without waiting, this rank's addend to what all ranks know of the save in flight:
        0 while it is written here, FAILED, or COMMITTED. Only rank 0 can tell that everything is,
        unless each node commits. See `is_settled`."""
        if self.in_flight is None or self._writer is None:
            return 0
        if self._outcome is None and self._writer.is_busy:
            outcome = self._writer.outcome(wait=False)
            self._outcome = None if outcome is None else (outcome.fault or "")
        if self._outcome is None:
            return 0
        return FAILED if self._outcome else COMMITTED * (self._world.is_main or bool(self._nodes))

    def is_settled(self, total: int) -> bool:
        """Whether the sum of all ranks' `status` says that waiting for the save takes no time."""
        return total >= (self._world.world_size * COMMITTED if self._nodes else COMMITTED)

    def finish(self) -> InFlight | None:
        """Wait until what is in flight is committed, and say what it was. All ranks call.

        Raises CheckpointError, on all ranks or on none, where it failed.
        """
        in_flight, writer = self.in_flight, self._writer
        if in_flight is None or writer is None:
            return None
        self.in_flight = None
        if self._outcome is None:
            outcome = writer.outcome(wait=True)
            self._outcome = (outcome.fault or "") if outcome else ""
        fault, self._outcome = self._outcome, None
        destination, self._destination = self._destination, None
        try:
            attempt(self._world, lambda: _raise(fault))
            if self._nodes and destination is not None:
                self._commit_everywhere(destination)
        except BaseException:
            if self._nodes and destination is not None and self._world.is_local_main:
                stagings.discard(destination.staging)
            raise
        return in_flight

    def close(self) -> None:
        """Let the process go; it finishes what it was told. Safe to call twice."""
        if self._writer is not None:
            self._writer.close()
        self._writer = None
        self.in_flight = None

    _outcome: str | None = None
    """The fault of the save in flight, empty without one; None while it is being written."""

    def _write(
        self, request: SaveRequest, snapshot: Snapshot, destination: Destination, *, wait: bool
    ) -> None:
        order = None if wait else self._copy(snapshot, destination)
        is_copied = all(self._everywhere(order is not None))
        files = attempt(self._world, lambda: self._callers_files(request, destination))
        if order is not None and is_copied and self._writer is not None:
            self._writer.give(order.with_files(files))
            self.in_flight = InFlight(target=request.target, progress=request.progress)
            self._destination = destination
            return
        share = snapshot.share(live_memory, caller_files=files)
        written = attempt(self._world, lambda: write_share(share, destination))
        if destination.root.nodes:
            self._commit_everywhere(destination)
        else:
            on_main(self._world, lambda: commit(written, destination))

    def _commit_everywhere(self, destination: Destination) -> None:
        """On every node its own, once all ranks have written. All ranks call."""
        world = self._world
        here = attempt(world, lambda: parts_here(destination) if world.is_local_main else {})
        parts = {
            name: content for each in gather_all(world, here) for name, content in each.items()
        }
        attempt(world, lambda: commit_on_node(destination, parts) if world.is_local_main else None)

    def _find_nodes(self, directory: Path) -> tuple[NodeOfCheckpoint, ...]:
        """The job's nodes where each is to save on its own disk; else none. Found out once."""
        if self._nodes is None:
            self._nodes = self._nodes_apart(directory) if self._wants_each_node else ()
        return self._nodes

    def _nodes_apart(self, directory: Path) -> tuple[NodeOfCheckpoint, ...]:
        if not are_apart(self._world, directory):
            if self._world.is_main:
                logger.warning(
                    "save_on_each_node: all nodes share %s, which takes one checkpoint", directory
                )
            return ()
        return job_nodes(self._world)

    def _open(
        self,
        request: SaveRequest,
        snapshot: Snapshot,
        engine: Engine,
        nodes: tuple[NodeOfCheckpoint, ...],
    ) -> Destination:
        """Where this rank writes: the staging of rank 0, or of its node's head."""
        world = self._world
        bounds = gather_all(world, snapshot.bound())
        if not nodes:
            needed = sum(bounds)
            return on_main(
                world, lambda: _open_destination(request, snapshot, engine, world, needed)
            )
        root = on_main(world, lambda: _root(request, snapshot, engine, world))
        node = next(i for i, each in enumerate(nodes) if world.rank in each.ranks)
        root = replace(root, nodes=nodes, node=node)
        needed = sum(bounds[rank] for rank in nodes[node].ranks)
        staging = attempt(
            world, lambda: _stage(request, needed=needed) if snapshot.is_head else None
        )
        stagings_of = gather_all(world, staging)
        head = nodes[node].ranks[0]
        return Destination(
            target=request.target, staging=stagings_of[head] or Path(), needed=needed, root=root
        )

    def _everywhere(self, is_so: bool) -> list[bool]:
        """Whether it is so on every rank. (A gather to one, told to all.)"""
        answers = gather(self._world, is_so)
        return on_main(self._world, lambda: answers)

    def _callers_files(self, request: SaveRequest, destination: Destination) -> tuple[str, ...]:
        is_head = self._world.is_local_main if destination.root.nodes else self._world.is_main
        if not is_head:
            return ()
        with stagings.naming_failed_write(request.target, needed=destination.needed):
            request.write_files(destination.staging)
        return files_in(destination.staging)

    def _copy(self, snapshot: Snapshot, destination: Destination) -> Order | None:
        """The copied state; None where it can't be, and the save is to happen at once."""
        if not self._wants_background:
            return None
        try:
            if self._writer is None or not self._writer.is_alive:
                self._writer = BackgroundWriter()
            return self._writer.copy(snapshot, destination)
        except (CheckpointError, OSError, RuntimeError, MemoryError) as fault:
            why: object = fault
            if isinstance(fault, OSError):
                name = destination.target.name
                why = f"no memory file could be made to save {name} from: {fault.strerror or fault}"
            logger.warning("saving while training waits: %s", why)
            return None


def _raise(fault: str) -> None:
    if fault:
        raise CheckpointError(fault)


def _open_destination(
    request: SaveRequest, snapshot: Snapshot, engine: Engine, world: RankInfo, needed: int
) -> Destination:
    staging = _stage(request, needed=needed)
    root = _root(request, snapshot, engine, world)
    return Destination(target=request.target, staging=staging, needed=needed, root=root)


def _stage(request: SaveRequest, *, needed: int) -> Path:
    """A fresh staging, on a disk that has the space."""
    directory = request.target.parent
    request.check_place()
    stagings.clear_leftovers(directory, run_id=request.run_id)
    staging = stagings.new_staging(request.target, run_id=request.run_id)
    try:
        stagings.check_space(directory, needed=needed)
    except CheckpointError:
        stagings.discard(staging)
        raise
    return staging


def _root(request: SaveRequest, snapshot: Snapshot, engine: Engine, world: RankInfo) -> Manifest:
    return Manifest(
        uuid=uuid.uuid4().hex,
        layout=snapshot.layout,
        run_id=request.run_id,
        engine=engine.name,
        world_size=world.world_size,
        progress=request.progress,
        created=stagings.time_of_commit(request.target.parent),
        versions=versions_of(("bigtrain", "torch", "transformers", "deepspeed")),
        parts={},
        param_groups=snapshot.param_groups,
    )
