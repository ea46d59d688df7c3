"""Which node of a Slurm job a task is on, read inside the task.

Slurm sets these variables for every task by itself. In a batch script they are expanded once, on
the first node, and every node then believes to be node 0: they are never passed on from there.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

from bigtrain.cluster.rendezvous import DEFAULT_DEADLINE_S, Seat
from bigtrain.cluster.rendezvous_address import resolve
from bigtrain.errors import LaunchError
from bigtrain.slurm import client, nodelist
from bigtrain.topology import is_slurm_step as is_step

TOKEN_VARIABLE = "BIGTRAIN_JOIN_TOKEN"
ADDRESSES_VARIABLE = "BIGTRAIN_HEAD_ADDRESSES"


def tasks_of_step(environment: Mapping[str, str]) -> int:
    """How many tasks srun started along with this one; 0 where this process is none."""
    is_task = "SLURM_PROCID" in environment and is_step(environment.get("SLURM_STEP_ID", ""))
    return _number(environment, "SLURM_STEP_NUM_TASKS", default=1) if is_task else 0


def nodes_of_step(environment: Mapping[str, str]) -> int:
    """On how many nodes srun started them."""
    return _number(environment, "SLURM_STEP_NUM_NODES", default=1)


def is_task_per_node(environment: Mapping[str, str]) -> bool:
    """Whether srun started exactly one task on every node: an agent, and not a rank."""
    tasks = tasks_of_step(environment)
    return tasks > 0 and tasks == nodes_of_step(environment)


def restart_count(environment: Mapping[str, str]) -> int:
    """How often this job was started before."""
    return _number(environment, "SLURM_RESTART_COUNT", default=0)


def read_seat(
    environment: Mapping[str, str],
    *,
    interface: str | None = None,
    deadline_s: float = DEFAULT_DEADLINE_S,
) -> Seat:
    """This task's node as a place in the run. LaunchError outside a step with a task per node."""
    if not is_task_per_node(environment):
        raise LaunchError(
            "this is no Slurm task that has a node to itself; start it with "
            "srun --ntasks-per-node=1"
        )
    hosts = nodelist.expand(environment.get("SLURM_STEP_NODELIST", ""))
    node_rank = _number(environment, "SLURM_NODEID")
    return Seat(
        node_rank=node_rank,
        num_nodes=_number(environment, "SLURM_STEP_NUM_NODES"),
        host=environment.get("SLURMD_NODENAME") or f"node {node_rank}",
        job=f"{environment.get('SLURM_JOB_ID')}.{environment.get('SLURM_STEP_ID')}",
        token=_token(environment),
        head_names=_names_of_head(environment, hosts),
        hosts=hosts,
        interface=interface,
        deadline_s=deadline_s,
    )


def read_rank_seat(
    environment: Mapping[str, str],
    *,
    interface: str | None = None,
    deadline_s: float = DEFAULT_DEADLINE_S,
) -> Seat:
    """This task as a rank that meets the step's others, wherever their nodes are."""
    rank, number = _number(environment, "SLURM_PROCID"), tasks_of_step(environment)
    node = environment.get("SLURMD_NODENAME") or "unknown"
    return Seat(
        node_rank=rank,
        num_nodes=number,
        host=f"rank {rank} on {node}",
        job=f"{environment.get('SLURM_JOB_ID')}.{environment.get('SLURM_STEP_ID')}",
        token=_token(environment),
        head_names=_names_of_head(
            environment, nodelist.expand(environment.get("SLURM_STEP_NODELIST", ""))
        ),
        hosts=tuple(f"rank {k}" for k in range(number)),
        interface=interface,
        deadline_s=deadline_s,
    )


def _names_of_head(environment: Mapping[str, str], hosts: tuple[str, ...]) -> tuple[str, ...]:
    """Where the first node may be found, best first. What leads nowhere does no harm.

    Its name, the address from which srun reached this task (its own, from a batch script), all
    the addresses that the batch script saw there, and, for a name that is not known, what Slurm's
    configuration says.
    """
    names = [*hosts[:1]]
    if environment.get("SLURM_LAUNCH_NODE_IPADDR"):
        names.append(environment["SLURM_LAUNCH_NODE_IPADDR"])
    names += environment.get(ADDRESSES_VARIABLE, "").split()
    if len(names) < 3 and hosts and not resolve(hosts[:1]):  # all nodes would ask the controller
        names += _configured_address(hosts[0])
    return tuple(dict.fromkeys(names))


def _configured_address(host: str) -> list[str]:
    """NodeAddr, which is an address where a cluster does without name service."""
    try:
        text = client.call(["scontrol", "show", "node", "--oneliner", host])
    except LaunchError:
        return []
    return [word.partition("=")[2] for word in text.split() if word.startswith("NodeAddr=")]


def _token(environment: Mapping[str, str]) -> bytes:
    """The word that the batch script made up; else what is the same for this start of this step
    and for no other, which keeps out whoever comes by mistake."""
    made_up = environment.get(TOKEN_VARIABLE)
    if made_up:
        return made_up.encode()
    names = ("CLUSTER_NAME", "JOB_UID", "JOB_ID", "STEP_ID", "RESTART_COUNT", "STEP_LAUNCHER_PORT")
    text = " ".join(environment.get(f"SLURM_{name}", "") for name in names)
    return hashlib.sha256(text.encode()).digest()


def _number(environment: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = environment.get(name, "")
    if text.isdigit():
        return int(text)
    if default is None:
        raise LaunchError(f"{name}={text!r} is not a whole number; was this started by srun?")
    return default
