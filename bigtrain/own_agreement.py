"""Whether the nodes of ranks that another launcher started can train together.

bigtrain's agents find it out while they meet (`bigtrain.cluster.nodes`). Of torchrun's, torch
elastic's and srun's ranks nobody has asked, so the ranks ask each other before they train.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import platform
import secrets
import time
from collections.abc import Sequence

from bigtrain.checkpoint.agreement import gather_all, on_main
from bigtrain.cluster import agreement, threads
from bigtrain.cluster.agreement import StorageToken
from bigtrain.cluster.nodes import visible_gpus
from bigtrain.cluster.rendezvous import Member, RefusedError
from bigtrain.errors import LaunchError
from bigtrain.plan import RunPlan
from bigtrain.topology import RankInfo

logger = logging.getLogger("bigtrain.worker")


def agree(plan: RunPlan, *, world: RankInfo) -> None:
    """Compare the nodes as bigtrain's agents do. All ranks call it, once they have joined.

    Differences that don't forbid the run are said by rank 0. LaunchError, on all ranks, with all
    that do; the other ranks' is a RefusedError, so that it is told once.
    """
    if plan.topology.nodes == 1:
        return
    storage = StorageToken(plan.output_dir, mark=on_main(world, lambda: secrets.token_hex(6)))
    fault = on_main(world, lambda: _write(storage))
    now = time.time()  # the same moment on all nodes, as near as a broadcast has it
    if fault is None:
        found = gather_all(world, _myself(plan, storage, world, now=now))
        if world.is_main:
            storage.remove()
        try:
            notes = agreement.compare(_nodes(found, plan.topology.procs_per_node), plan)
        except LaunchError as error:
            fault = str(error)
    if fault is not None:
        raise LaunchError(fault) if world.is_main else RefusedError(fault)
    for note in notes if world.is_main else ():
        logger.info(note)


def _write(storage: StorageToken) -> str | None:
    """Write what the others look for; what went wrong, in words."""
    try:
        storage.write()
    except OSError as error:
        place = storage.path.parent
        return f"output_dir {place} can't be written to: {error.strerror}; give another output_dir"
    return None


def _myself(plan: RunPlan, storage: StorageToken, world: RankInfo, *, now: float) -> Member:
    """This rank, as the node that it is on. `clock_offset_s`: its clock itself."""
    facts = agreement.node_facts(
        plan,
        gpus=visible_gpus(os.environ),
        cores=threads.available_cores(),
        sees_output=storage.is_there(),
    )
    return Member(
        node_rank=world.node_rank,
        host=platform.node(),
        facts=facts,
        reaches={},
        clock_offset_s=now,
    )


def _nodes(ranks: Sequence[Member], procs: int) -> list[Member]:
    """The first rank of each node, with what all ranks there have; clocks against rank 0's."""
    first = {rank.node_rank: rank for rank in reversed(ranks)}
    nodes = []
    for node_rank, member in sorted(first.items()):
        seen = [list(r.facts["gpus"]) for r in ranks if r.node_rank == node_rank]
        # Each rank sees all of its node's, or has been given its own.
        most = max(seen, key=len)
        gpus = most if len(most) >= procs else [gpu for one in seen for gpu in one]
        nodes.append(
            dataclasses.replace(
                member,
                facts={**member.facts, "gpus": gpus},
                clock_offset_s=member.clock_offset_s - ranks[0].clock_offset_s,
            )
        )
    return nodes
