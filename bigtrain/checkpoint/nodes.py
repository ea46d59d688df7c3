"""Checkpoints on the nodes' own disks: every node keeps what its ranks need. No torch.

Each node has a directory `checkpoint-500` of its own, with its ranks' files, and with the manifest
and the parts of all ranks: each knows the whole checkpoint, and who has which bytes. The first rank
of a node is its head, which stages and commits there; all do once all nodes have written. What the
ranks of one node own and others also hold (replicas, whole tensors) is on each of their disks.

On coming back, the newest checkpoint counts that every node has, and whose nodes are all there.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from bigtrain.checkpoint.find import find_checkpoint
from bigtrain.checkpoint.manifest import NodeOfCheckpoint
from bigtrain.errors import CheckpointError


@dataclass(frozen=True, kw_only=True)
class Held:
    """A checkpoint that a node has on its disk and that verified there."""

    name: str
    uuid: str
    created: str
    node: int
    """Which of `nodes` it was when it wrote; 0 where the storage was shared."""
    nodes: tuple[NodeOfCheckpoint, ...]
    """All that wrote it; none where the storage was shared."""


@dataclass(frozen=True, kw_only=True)
class Holdings:
    """What one node of the present job has; its other ranks tell nothing."""

    host: str
    held: tuple[Held, ...]
    passed_over: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, kw_only=True)
class Agreed:
    """The checkpoint that all go on from, and the newer ones that they don't."""

    name: str | None
    passed_over: tuple[tuple[str, str], ...] = ()
    incomplete: tuple[str, ...] = ()
    """Of these, such as are whole on other nodes than these."""


def holdings(
    output_dir: Path, *, host: str, since: datetime | None = None, excluding: Iterable[Path] = ()
) -> Holdings:
    """Every checkpoint here from which training can go on, the newest first."""
    held: list[Held] = []
    passed: list[tuple[str, str]] = []
    excluded = set(excluding)
    while True:
        found = find_checkpoint(output_dir, resumable=True, since=since, excluding=excluded)
        passed += [(path.name, why) for path, why in found.passed_over]
        excluded |= {path for path, _ in found.passed_over}
        if found.path is None or found.manifest is None:
            return Holdings(host=host, held=tuple(held), passed_over=tuple(passed))
        excluded.add(found.path)
        manifest = found.manifest
        held.append(
            Held(
                name=found.path.name,
                uuid=manifest.uuid,
                created=manifest.created,
                node=manifest.node or 0,
                nodes=manifest.nodes,
            )
        )


def agree(everyone: Sequence[Holdings | None]) -> Agreed:
    """The newest that all nodes of the job hold and that misses none: the same on all ranks."""
    here = [holdings for holdings in everyone if holdings is not None]
    passed = [(name, f"{h.host}: {why}") for h in here for name, why in h.passed_over]
    incomplete: list[str] = []
    newest = sorted(
        {(held.created, held.uuid): held for h in here for held in h.held}.items(), reverse=True
    )
    for (_, mark), held in newest:
        why = _missing(mark, held, here)
        if not why:
            return Agreed(name=held.name, passed_over=tuple(passed), incomplete=tuple(incomplete))
        passed.append((held.name, why))
        incomplete.append(f"{held.name} {why}")
    return Agreed(name=None, passed_over=tuple(passed), incomplete=tuple(incomplete))


def _missing(mark: str, held: Held, here: Sequence[Holdings]) -> str:
    """Why the checkpoint can't be gone on from; empty when it can."""
    present = {found.node for h in here for found in h.held if found.uuid == mark}
    lost = [node for number, node in enumerate(held.nodes) if number not in present]
    if lost:
        return "is not whole: " + "; ".join(map(_gone, lost))
    without = [h.host for h in here if all(found.uuid != mark for found in h.held)]
    if without:
        return f"is not on the disk of {', '.join(without)}, which is new to the run or has lost it"
    return ""


def _gone(node: NodeOfCheckpoint) -> str:
    ranks = ", ".join(map(str, node.ranks))
    return (
        f"node {node.host} has what ranks {ranks} wrote, and isn't in this job or has lost it; "
        "start the job with it, or copy its directory over this one"
    )


def nodes_of(worlds: Sequence[tuple[int, str]]) -> tuple[NodeOfCheckpoint, ...]:
    """The job's nodes, from each rank's (node_rank, host)."""
    ranks: dict[int, list[int]] = {}
    for rank, (node, _) in enumerate(worlds):
        ranks.setdefault(node, []).append(rank)
    hosts = dict(worlds)
    return tuple(
        NodeOfCheckpoint(host=hosts[node], ranks=tuple(ranks[node])) for node in sorted(ranks)
    )


def probe(directory: Path) -> Path:
    """A file that only who has the same storage sees."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f".bigtrain-node-{uuid.uuid4().hex}"
    path.touch()
    return path


def is_apart(seen: Sequence[Sequence[bool] | None]) -> bool:
    """Whether every node has storage of its own, from what each head sees of all heads' probes."""
    heads = [flags for flags in seen if flags is not None]
    if all(all(flags) for flags in heads):
        return False
    if all(sum(flags) == 1 for flags in heads):
        return True
    raise CheckpointError(
        "save_on_each_node: some nodes share the output directory and others don't; give one that "
        "all share, or one on each node's own disk"
    )
