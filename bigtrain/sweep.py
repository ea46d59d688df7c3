"""A sweep: the same run once for every combination of the values that `--sweep` names."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence

from bigtrain.errors import ConfigError
from bigtrain.layers import Override, parse_assignment
from bigtrain.plan import RunPlan


def plans(axes: Sequence[str], plan: Callable[..., RunPlan]) -> list[RunPlan]:
    """One plan where there are no axes; else one for each combination, with a name and an output
    directory of its own below the run's.

    `axes`: as typed, `training.learning_rate=1e-4,3e-4`; `plan` makes a plan with overrides on top.
    """
    first = plan()
    if not axes:
        return [first]
    found = []
    for point in itertools.product(*(_axis(text) for text in axes)):
        label = ",".join(f"{o.key.rpartition('.')[2]}={_plain(o.value)}" for o in point)
        own = (
            Override(key="output_dir", value=f"{first.output_dir}/{label}", origin="--sweep"),
            Override(key="name", value=f"{first.name}/{label}", origin="--sweep"),
        )
        found.append(plan(*point, *own))
    return found


def _axis(text: str) -> list[Override]:
    """`training.learning_rate=1e-4,3e-4` as one override for each value."""
    key, separator, values = text.partition("=")
    if not separator or not all(values.split(",")):
        raise ConfigError(f"--sweep {text}: write section.key=value,value")
    found = [parse_assignment(f"{key}={value}") for value in values.split(",")]
    return [dataclasses.replace(override, origin="--sweep") for override in found]


def _plain(value: object) -> str:
    return "".join(c if c.isalnum() or c in "-+._" else "_" for c in str(value))
