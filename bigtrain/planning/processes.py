"""How many processes, on which device, under which engine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from bigtrain.cluster import threads
from bigtrain.errors import ConfigError
from bigtrain.planning.gpus import count_gpus
from bigtrain.planning.request import Surroundings
from bigtrain.run_config import RunConfig, ScriptConfig
from bigtrain.sections import ClusterSection, EngineSection
from bigtrain.topology import RankInfo, Topology
from bigtrain.translate import foreign, topology_for
from bigtrain.translate.config import EngineName

Device = Literal["cpu", "cuda"]


@dataclass(frozen=True, kw_only=True)
class Processes:
    """The shape of the run, and where each part of it was decided."""

    topology: Topology
    device: Device
    engine: EngineName
    origins: Mapping[str, str] = field(default_factory=dict)


def processes_of(
    config: RunConfig | ScriptConfig, training: Mapping[str, Any], surroundings: Surroundings
) -> Processes:
    """The processes that the sections ask for, or that the machines suggest.

    `training`: with what given configs fill. Raises ConfigError where this machine can't carry
    them, unless it is a rehearsal.
    """
    cluster, origins, world = config.cluster, config.origins, surroundings.world
    use_cpu = bool(training.get("use_cpu"))
    gpus = 0 if use_cpu else _gpus(cluster, surroundings)
    is_elsewhere = surroundings.gpus_of_nodes is not None
    if is_elsewhere and cluster.procs_per_node is None and not gpus:
        raise ConfigError(
            "cluster.procs_per_node: say how many processes each node runs (--procs-per-node 8), "
            "or how many GPUs it is to have (cluster.slurm.gpus_per_node)"
        )
    nodes, procs, said = _numbers(cluster, gpus, world, origins)
    assumes_gpus = surroundings.device_memory is not None and not use_cpu
    if not surroundings.is_rehearsal and world is None and not is_elsewhere:
        _check_machine(procs, gpus=gpus, origin=origins.get("cluster.procs_per_node"))
    name, why = _engine(config.engine, foreign.asked_engine(training), nodes * procs)
    by_node = procs if foreign.shards_by_node(training) else None
    return Processes(
        topology=_topology(name, nodes, procs, config.engine.shard or by_node, origins),
        device="cuda" if gpus or assumes_gpus else "cpu",
        engine=name,
        origins={**said, **why},
    )


def _gpus(cluster: ClusterSection, surroundings: Surroundings) -> int:
    """Those of each node."""
    if surroundings.gpus_of_nodes is not None:
        return surroundings.gpus_of_nodes(cluster)
    return count_gpus({**surroundings.environment, **cluster.environment()})


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
