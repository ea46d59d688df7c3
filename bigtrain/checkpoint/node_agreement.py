"""What the nodes of a job find out together about the disks that they save on. All ranks call."""

from __future__ import annotations

import logging
import platform
from collections.abc import Set
from datetime import datetime
from pathlib import Path

from bigtrain.checkpoint import nodes
from bigtrain.checkpoint.agreement import attempt, gather_all
from bigtrain.checkpoint.load import LoadedCheckpoint
from bigtrain.checkpoint.manifest import NodeOfCheckpoint
from bigtrain.errors import CheckpointError
from bigtrain.topology import RankInfo

logger = logging.getLogger(__name__)


def job_nodes(world: RankInfo) -> tuple[NodeOfCheckpoint, ...]:
    """The nodes, by number."""
    return nodes.nodes_of(gather_all(world, (world.node_rank, platform.node())))


def are_apart(world: RankInfo, directory: Path) -> bool:
    """Whether `directory` lies on a disk of each node's own; CheckpointError where on some."""
    mine = attempt(world, lambda: nodes.probe(directory) if world.is_local_main else None)
    try:
        probes = [probe for probe in gather_all(world, mine) if probe is not None]
        seen = None
        if world.is_local_main:
            names = {path.name for path in directory.iterdir()}
            seen = [probe.name in names for probe in probes]
        return nodes.is_apart(gather_all(world, seen))
    finally:
        if mine is not None:
            mine.unlink(missing_ok=True)


def require_same(world: RankInfo, loaded: LoadedCheckpoint) -> None:
    """CheckpointError on all ranks where nodes have opened checkpoints of different saves."""
    marks = gather_all(world, loaded.manifest.uuid if loaded.is_own else "")
    if len(set(marks)) > 1:
        loaded.close()
        raise CheckpointError(
            f"{loaded.path}: the nodes have different ones of that name on their disks; use "
            "--resume auto, which finds the newest that all have"
        )


def newest_on_all_nodes(
    world: RankInfo, output_dir: Path, *, since: datetime | None, excluding: Set[Path]
) -> Path | None:
    """This node's directory of the newest checkpoint that every node has and that misses none.

    CheckpointError where there are some, and all of them miss a node.
    """
    here = attempt(world, lambda: _holdings(world, output_dir, since, excluding))
    found = nodes.agree(gather_all(world, here))
    for name, why in found.passed_over if world.is_main else ():
        logger.warning("%s is passed over: %s", name, why)
    if found.name is None and found.incomplete and since is None:
        raise CheckpointError(
            "no checkpoint is whole on the disks of these nodes: "
            f"{'; '.join(found.incomplete)}; or begin anew with --resume never"
        )
    return None if found.name is None else output_dir / found.name


def _holdings(
    world: RankInfo, output_dir: Path, since: datetime | None, excluding: Set[Path]
) -> nodes.Holdings | None:
    if not world.is_local_main:
        return None
    return nodes.holdings(output_dir, host=platform.node(), since=since, excluding=excluding)
