"""Ranks that srun started one by one, without an agent on their node: how they find each other.

The ranks themselves meet as nodes otherwise do (`bigtrain.cluster.rendezvous`), and the socket at
which they met becomes rank 0's store: no port in the job script, and none bound twice.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from bigtrain.cluster import agreement, rendezvous
from bigtrain.cluster.nodes import interface_variables
from bigtrain.cluster.rendezvous import Joined, Member
from bigtrain.plan import RunPlan
from bigtrain.slurm import identity

if TYPE_CHECKING:
    from torch._C._distributed_c10d import TCPStore


@dataclass(frozen=True, kw_only=True)
class Meeting:
    """What a rank needs to make the process group."""

    variables: Mapping[str, str]
    """For its environment."""
    store: TCPStore | None
    """Rank 0's, which serves all ranks for as long as it is kept."""


def meet(plan: RunPlan, *, environment: Mapping[str, str]) -> Meeting:
    """Meet the step's other tasks, which all call it. LaunchError if they can't start together."""
    seat = identity.read_rank_seat(
        environment, interface=plan.interface, deadline_s=float(plan.join_timeout_s)
    )

    def facts() -> dict[str, Any]:
        return agreement.software_facts(plan)

    def decide(members: Sequence[Member]) -> Mapping[str, Any]:
        agreement.compare_software(members)
        return {}

    joined = rendezvous.join(seat, facts, decide=decide)
    store = _serve(joined) if joined.listener is not None else None
    for connection in joined.connections.values():
        with contextlib.suppress(OSError):
            connection.close()
    variables = {
        "MASTER_ADDR": joined.address,
        "MASTER_PORT": str(joined.port),
        # The store is there already: rank 0 must connect to it, too, and not open its own.
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
        **interface_variables(joined, said=environment),
    }
    return Meeting(variables=variables, store=store)


def _serve(joined: Joined) -> TCPStore:
    from torch._C._distributed_c10d import TCPStore

    assert joined.listener is not None
    return TCPStore(
        joined.address,
        joined.port,
        is_master=True,
        wait_for_workers=False,
        master_listen_fd=joined.listener.detach(),
    )
