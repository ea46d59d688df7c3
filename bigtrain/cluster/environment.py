"""The variables that the processes of a run start with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from bigtrain.cluster.layout import NodeLogs
from bigtrain.plan import PLAN_VARIABLE, RunPlan

LOG_DIR_VARIABLE = "BIGTRAIN_LOG_DIR"
RESTART_VARIABLE = "BIGTRAIN_RESTART_COUNT"


@dataclass(frozen=True, kw_only=True)
class Place:
    """This node in the run, and where the run's store is."""

    node_rank: int
    store_host: str
    store_port: int


def for_node(
    plan: RunPlan, *, inherited: Mapping[str, str], logs: NodeLogs | None = None
) -> dict[str, str]:
    """What all ranks of a node share, and what is read when a module is imported, so that it must
    be there before the fork server. The plan wins over what is inherited, that over defaults.

    `logs`: where a GPU's collectives are recorded, if the agent keeps the logs.
    """
    return {
        # DeepSpeed's import asks how many GPUs there are; these two keep that from starting CUDA.
        "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
        "DS_ACCELERATOR": plan.device,
        "OMP_NUM_THREADS": str(plan.threads_per_rank),
        **_library_defaults(plan),
        **(flight_recorder(logs.directory) if logs and plan.device == "cuda" else {}),
        **inherited,
        **plan.environment,
    }


def for_rank(
    plan: RunPlan, *, plan_path: str, local_rank: int, place: Place, logs: NodeLogs, restarts: int
) -> dict[str, str]:
    """What differs between ranks, nodes and restarts: torch elastic's names, and our own."""
    procs, world = plan.topology.procs_per_node, plan.topology.world_size
    rank = place.node_rank * procs + local_rank
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(local_rank),
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(procs),
        "GROUP_RANK": str(place.node_rank),
        "GROUP_WORLD_SIZE": str(plan.topology.nodes),
        "ROLE_RANK": str(rank),
        "ROLE_WORLD_SIZE": str(world),
        "ROLE_NAME": "default",
        "MASTER_ADDR": place.store_host,
        "MASTER_PORT": str(place.store_port),
        # The store is served by the launcher: rank 0 must connect to it and not open its own.
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": str(restarts),
        "TORCHELASTIC_MAX_RESTARTS": str(plan.max_restarts),
        "TORCHELASTIC_RUN_ID": f"{plan.name}-{plan.attempt:02d}",
        PLAN_VARIABLE: plan_path,
        LOG_DIR_VARIABLE: str(logs.directory),
        RESTART_VARIABLE: str(restarts),
    }


def _library_defaults(plan: RunPlan) -> dict[str, str]:
    """On one node gloo goes through the loopback: a host name need not resolve. On several, torch
    warns in every rank of each peer whose address has no name."""
    if plan.topology.nodes == 1:
        return {"GLOO_SOCKET_IFNAME": "lo"}
    return {"TORCH_CPP_LOG_LEVEL": "ERROR"}


def flight_recorder(directory: Path) -> dict[str, str]:
    """Variables that have NCCL keep the last collectives of every rank, and write them to
    `directory` when one times out.

    https://docs.pytorch.org/tutorials/unstable/flight_recorder_tutorial.html
    """
    return {
        "TORCH_FR_BUFFER_SIZE": "2000",
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
        "TORCH_FR_DUMP_TEMP_FILE": str(directory / "nccl-trace-rank-"),
    }
