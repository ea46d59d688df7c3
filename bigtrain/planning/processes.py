"""How many processes, on which device, under which engine."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from bigtrain.cluster import threads
from bigtrain.errors import ConfigError
from bigtrain.planning.gpus import count_gpus
from bigtrain.sections import ClusterSection, EngineSection
from bigtrain.topology import RankInfo, Topology
from bigtrain.translate import topology_for
from bigtrain.translate.config import EngineName

Device = Literal["cpu", "cuda"]


@dataclass(frozen=True, kw_only=True)
class Processes:
    """The shape of the run, and where each part of it was decided."""

    topology: Topology
    device: Device
    engine: EngineName
    origins: Mapping[str, str] = field(default_factory=dict)


def choose_processes(
    engine: EngineSection,
    cluster: ClusterSection,
    *,
    environment: Mapping[str, str],
    use_cpu: bool,
    asked_by_arguments: EngineName | None,
    world: RankInfo | None,
    is_rehearsal: bool,
    origins: Mapping[str, str],
    gpus_of_nodes: Callable[[ClusterSection], int] | None = None,
    assumes_gpus: bool = False,
    shards_by_node: bool = False,
) -> Processes:
    """The processes that the sections ask for, or that this machine suggests.

    `gpus_of_nodes` tells what the run's machines have, where this is none of them.
    `assumes_gpus`: plan for GPUs, though this machine may have none.
    `shards_by_node`: where no shard is said, each node holds a copy of the model.
    `world` is the place that another launcher gave this process: then its numbers hold.
    Raises ConfigError where this machine can't carry them, unless it is a rehearsal.
    """
    if use_cpu:
        gpus = 0
    elif gpus_of_nodes is not None:
        gpus = gpus_of_nodes(cluster)
    else:
        gpus = count_gpus({**environment, **cluster.environment()})
    if gpus_of_nodes is not None and cluster.procs_per_node is None and not gpus:
        raise ConfigError(
            "cluster.procs_per_node: say how many processes each node runs (--procs-per-node 8), "
            "or how many GPUs it is to have (cluster.slurm.gpus_per_node)"
        )
    nodes, procs, said = _numbers(cluster, gpus, world, origins)
    device: Device = "cuda" if gpus or (assumes_gpus and not use_cpu) else "cpu"
    if not is_rehearsal and world is None and gpus_of_nodes is None:
        _check_machine(procs, gpus=gpus, origin=origins.get("cluster.procs_per_node"))
    name, why = _engine(engine, asked_by_arguments, nodes * procs)
    shard = engine.shard or (procs if shards_by_node else None)
    topology = _topology(name, nodes, procs, shard, origins)
    return Processes(topology=topology, device=device, engine=name, origins={**said, **why})


def _numbers(
    cluster: ClusterSection, gpus: int, world: RankInfo | None, origins: Mapping[str, str]
) -> tuple[int, int, dict[str, str]]:
    """Nodes, processes on each, and where the latter was decided."""
    key = "cluster.procs_per_node"
    if world is not None:
        nodes = max(1, world.world_size // world.local_world_size)
        return nodes, world.world_size // nodes, {key: f"{world.source}'s variables"}
    if cluster.procs_per_node is not None:
        return cluster.nodes, cluster.procs_per_node, {}
    why = f"one for each of {gpus} GPUs" if gpus else "one, there is no GPU"
    return cluster.nodes, gpus or 1, {key: why}


def _check_machine(procs: int, *, gpus: int, origin: str | None) -> None:
    said = f"{origin}: " if origin else ""
    if gpus and procs > gpus:
        raise ConfigError(
            f"{said}cluster.procs_per_node: {procs} processes, but this machine shows {gpus} "
            f"GPU{'s' if gpus > 1 else ''}; use {gpus} or fewer, or training.use_cpu=true"
        )
    if not gpus and not threads.sensible(procs):
        raise ConfigError(
            f"{said}cluster.procs_per_node: {procs} processes are more than this machine's "
            f"{threads.available_cores()} CPU cores can share; use {threads.most_ranks()} or fewer"
        )


def _engine(
    section: EngineSection, asked_by_arguments: EngineName | None, world_size: int
) -> tuple[EngineName, dict[str, str]]:
    if section.name != "auto":
        return section.name, {}
    if asked_by_arguments is not None:
        return asked_by_arguments, {"engine.name": "auto: as the training arguments ask"}
    if world_size == 1:
        return "single", {"engine.name": "auto: one process"}
    return "fsdp", {"engine.name": f"auto: {world_size} processes"}


def _topology(
    engine: EngineName,
    nodes: int,
    procs: int,
    shard: int | None,
    origins: Mapping[str, str],
) -> Topology:
    try:
        return topology_for(engine, nodes=nodes, procs_per_node=procs, shard=shard)
    except ConfigError as error:
        origin = origins.get("engine.shard")
        said = f"{origin}: " if origin else ""
        raise ConfigError([f"{said}engine.shard: {fault}" for fault in error.faults]) from None
