"""Launches one plan in a process of its own, as the command line does. Argument: fields as JSON."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from bigtrain.cluster.local import launch
from bigtrain.console import open_console
from bigtrain.errors import BigtrainError
from bigtrain.plan import RunPlan
from bigtrain.topology import Topology
from bigtrain.translate.config import EngineConfig, SingleSettings


def make_plan(fields: dict[str, Any]) -> RunPlan:
    procs = fields.pop("procs", 1)
    defaults: dict[str, Any] = {
        "name": "test",
        "kind": "script",
        "working_dir": str(Path.cwd()),
        "topology": Topology(procs_per_node=procs),
        "device": "cpu",
        "engine": EngineConfig(name="single", settings=SingleSettings()),
    }
    return RunPlan(**{**defaults, **fields})


def main() -> int:
    fields = json.loads(sys.argv[1])
    console = open_console(as_json=fields.pop("json", False))
    plan = make_plan(fields)
    try:
        return launch(plan, Path(plan.output_dir) / "plan.json", console=console)
    except BigtrainError as error:
        print(error, file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
