"""The plan of a run that another launcher started: torchrun, srun, or nobody.

Every rank derives it from the same file and flags, before the ranks have joined and so before any
of them has written anything that would change the answer.
"""

from __future__ import annotations

import argparse
import atexit
import os
import platform
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from bigtrain.cluster.layout import NodeLogs
from bigtrain.layers import Override, parse_assignment
from bigtrain.plan import RunPlan, write_plan
from bigtrain.planning import Request, Surroundings, make_plan
from bigtrain.topology import RankInfo


def own_plan(
    arguments: Sequence[str], *, world: RankInfo, environment: Mapping[str, str]
) -> RunPlan:
    """The plan for a run file and flags, with as many processes as `world` says there are."""
    flags = _parser().parse_args(arguments)
    named = {
        "engine.name": ("--engine", flags.engine),
        "output_dir": ("--output-dir", flags.output_dir),
    }
    overrides = [parse_assignment(text) for text in flags.set]
    overrides += [
        Override(key=key, value=value, origin=f"flag {flag}")
        for key, (flag, value) in named.items()
        if value is not None
    ]
    request = Request(target=flags.run_file, overrides=tuple(overrides), resume=flags.resume)
    return make_plan(
        request, Surroundings(environment=environment, working_dir=Path.cwd(), world=world)
    )


def own_logs(plan: RunPlan, *, world: RankInfo) -> NodeLogs:
    """Where this rank's log goes: the same place as under bigtrain's agent."""
    return NodeLogs.of(
        output_dir=plan.output_dir,
        attempt=plan.attempt,
        node_rank=world.node_rank,
        host=platform.node(),
    )


def record(plan: RunPlan, *, world: RankInfo) -> Path:
    """A file that holds the plan, for this rank to find it by: rank 0's is the run's record.

    The others' are their own and go with them: they may not share rank 0's storage. Call it once
    all ranks have their plan.
    """
    if world.is_main:
        path = Path(plan.output_dir) / "plans" / f"attempt-{plan.attempt:02d}.json"
        write_plan(plan, path)
        return path
    handle, name = tempfile.mkstemp(prefix=f"bigtrain-plan-{world.rank}-", suffix=".json")
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        file.write(plan.to_json())
    atexit.register(Path(name).unlink, missing_ok=True)
    return Path(name)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bigtrain.worker",
        description="Train as one rank of a run file. Ranks come from torchrun, srun or mpirun.",
    )
    parser.add_argument("run_file", metavar="RUN.yaml")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE")
    parser.add_argument("--engine", help="single, ddp, fsdp, zero1, zero2 or zero3")
    parser.add_argument("--output-dir")
    parser.add_argument("--resume", metavar="auto|never|PATH")
    return parser
