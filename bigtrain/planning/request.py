"""What was asked for, and where: all that planning starts from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from bigtrain.errors import ConfigError
from bigtrain.layers import Override
from bigtrain.paths import below
from bigtrain.plan import RunPlan
from bigtrain.planning.device_memory import DeviceMemory
from bigtrain.run_file import read_run_file
from bigtrain.sections import ClusterSection
from bigtrain.topology import RankInfo
from bigtrain.translate import accelerate_config


@dataclass(frozen=True, kw_only=True)
class Request:
    """What was asked for on the command line."""

    target: str
    """A run file or a Python script: a path, or the name of a bundled file."""
    script_args: tuple[str, ...] = ()
    overrides: tuple[Override, ...] = ()
    """In order of precedence, the strongest last: `--set`, then flags."""
    resume: str | None = None
    """`auto`, `never`, or a checkpoint's path. None: as the run file says, else auto; for a
    script, as its own call of `train` says."""
    accelerate_config: str | None = None
    """Path of a config file of accelerate's."""


@dataclass(frozen=True, kw_only=True)
class Surroundings:
    """Where the planning happens, read once by whoever starts it."""

    environment: Mapping[str, str]
    working_dir: Path
    world: RankInfo | None = None
    """The place that another launcher gave this process; None where bigtrain launches."""
    is_rehearsal: bool = False
    """True where nothing will start here: this machine's limits and output_dir don't count."""
    memory_of: Callable[[RunPlan], DeviceMemory] | None = None
    """The memory of each rank of a plan, where that is not this machine's."""
    device_memory: int | None = None
    """Bytes of each rank's GPU, where it was said; the run is then one on GPUs."""
    gpus_of_nodes: Callable[[ClusterSection], int] | None = None
    """GPUs of each node that the run will have, where it starts on other machines than this."""


def foreign_overrides(request: Request, surroundings: Surroundings) -> list[Override]:
    """What accelerate's config file says, in a run file's keys."""
    if request.accelerate_config is None:
        return []
    path = below(surroundings.working_dir, request.accelerate_config, label="--accelerate-config")
    file = read_run_file(path, label=request.accelerate_config)
    if file.faults:
        raise ConfigError(file.faults)
    return accelerate_config.overrides(file.values, label=request.accelerate_config)
