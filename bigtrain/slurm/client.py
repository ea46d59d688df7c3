"""Slurm's own programs, called with a time limit and told of in plain words."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bigtrain.errors import LaunchError


class NoAnswerError(LaunchError):
    """A program was given up on. What it was asked for may have been done all the same."""


_PATIENCE_S = 60.0
"""A busy controller takes seconds to answer; one that is away, for ever."""
_UNHEARD = ("Socket timed out on send/recv", "Zero Bytes were transmitted or received")
"""What Slurm's programs say where the request was sent and no answer came: a controller that is
busy does what it was asked for all the same."""
_WITHOUT_CLUSTER = (
    "Could not establish a configuration source",
    "Unable to establish configuration source",
)
"""What they say on a machine that has them installed and belongs to no cluster."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a program said that did what it was asked for."""

    printed: str
    remarks: tuple[str, ...]
    """The lines of its stderr: what a cluster tells those who use it."""


def call(command: Sequence[str], *, cwd: Path | None = None) -> str:
    """What a program printed. LaunchError with its own words when it fails or is not there."""
    return ask(command, cwd=cwd).printed


def ask(command: Sequence[str], *, cwd: Path | None = None) -> Answer:
    """The same, with what it remarked besides."""
    try:
        done = subprocess.run(
            command,
            cwd=cwd,
            capture_output=True,
            text=True,
            errors="replace",  # job names and a cluster's own messages may be in any encoding
            timeout=_PATIENCE_S,
            check=False,
        )
    except FileNotFoundError:
        raise LaunchError(
            f"{command[0]} was not found on this machine; Slurm jobs are submitted from a machine "
            "that has Slurm's commands, usually a login node"
        ) from None
    except subprocess.TimeoutExpired:
        raise NoAnswerError(
            f"{command[0]} has not answered for {_PATIENCE_S:.0f} s; is Slurm's controller up? "
            "(scontrol ping)"
        ) from None
    if done.returncode != 0:
        if any(words in done.stderr for words in _WITHOUT_CLUSTER):
            raise LaunchError(
                f"{command[0]} finds no cluster from this machine (it has no slurm.conf, and DNS "
                "names no controller); run this on a login node of the cluster, or set SLURM_CONF "
                "to its slurm.conf"
            )
        said = (done.stderr.strip() or done.stdout.strip()).splitlines()
        lines = [f"{command[0]} failed with exit code {done.returncode}"]
        is_unheard = any(words in line for line in said for words in _UNHEARD)
        kind = NoAnswerError if is_unheard else LaunchError
        raise kind("\n".join([*lines, *(f"  {line}" for line in said)]))
    remarks = (line.strip() for line in done.stderr.splitlines())
    return Answer(printed=done.stdout, remarks=tuple(line for line in remarks if line))
