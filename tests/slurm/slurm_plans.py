"""Plans for tests: a user's script, on a CPU, with nothing that a library would have to read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bigtrain.plan import RunPlan
from bigtrain.topology import Topology
from bigtrain.translate.config import EngineConfig, SingleSettings


def make_plan(
    *, output_dir: Path, source: Path, nodes: int = 2, procs_per_node: int = 1, **fields: Any
) -> RunPlan:
    """A plan that runs the script `source`."""
    defaults: dict[str, Any] = {
        "name": "trial",
        "kind": "script",
        "source": str(source),
        "working_dir": str(source.parent),
        "topology": Topology(nodes=nodes, procs_per_node=procs_per_node),
        "device": "cpu",
        "engine": EngineConfig(name="single", settings=SingleSettings()),
        "output_dir": str(output_dir),
        "preload": ("torch",),
    }
    return RunPlan(**(defaults | fields))
