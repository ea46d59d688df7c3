"""Whether a run may write where it is to, found out before anything starts and without writing."""

from __future__ import annotations

import os
from pathlib import Path

from bigtrain.errors import ConfigError
from bigtrain.paths import below
from bigtrain.plan import RunPlan


def refusal(path: Path) -> str:
    """Why nothing can be written in the directory, which may be still to be made; else empty."""
    place = next((each for each in (path, *path.parents) if os.access(each, os.F_OK)), path)
    if not place.is_dir():
        return f"{place} is a file"
    if not os.access(place, os.W_OK | os.X_OK):
        return f"{place} can't be written to by this user"
    if os.statvfs(place).f_blocks:
        return ""
    return _attempted(place)


def check_cache(plan: RunPlan) -> None:
    """ConfigError where `data.cache_dir` is of no use on this machine, on which the run starts."""
    said = plan.data.get("cache_dir")
    if said is None:
        return
    path = below(Path(plan.working_dir), str(said), label="data.cache_dir")
    if why := refusal(path):
        where = plan.origins.get("data.cache_dir")
        raise ConfigError(
            f"{f'{where}: ' if where else ''}data.cache_dir: {path} can't be used: {why}; "
            "give a directory that you may write to"
        )


def _attempted(place: Path) -> str:
    """Of a file system without blocks, such as /proc: there only an attempt tells."""
    probe = place / f".bigtrain-{os.getpid()}"
    try:
        probe.mkdir()
        probe.rmdir()
    except OSError as error:
        return f"nothing can be made in {place} ({error.strerror})"
    return ""
