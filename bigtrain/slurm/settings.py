"""What `cluster.slurm` of a run file and the flags beside it ask for, checked."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bigtrain.errors import ConfigError
from bigtrain.secrecy import SECRET_ADVICE, holds_secret, holds_token
from bigtrain.slurm.options import place_of, read_options

# `NAME=value` in bash; a value that begins so is not written there but found when the job runs.
_ASSIGNMENT = re.compile(r"(?:^|[\s;&|])([A-Za-z_]\w*)=[\"']?([^\s\"']+)")
_COMPUTED = ("$", "`", "<")
_GPU_COUNT = re.compile(r"(?:.*:)?(\d+)(?:\(.*\))?")


@dataclass(frozen=True, kw_only=True)
class SlurmSettings:
    """How a run becomes a job: sbatch's own options, and what they can't say."""

    options: Mapping[str, str | None] = field(default_factory=dict)
    """By long name; None for an option without a value."""
    left_out: frozenset[str] = frozenset()
    """Options that are set to false: those of ours among them are not there either."""
    modules: tuple[str, ...] = ()
    """Environment modules to load, in order."""
    setup: str = ""
    """Bash that runs on the first node before the tasks start, which inherit its variables."""
    python: str | None = None
    """Interpreter on the nodes; None: this one, by its absolute path (`python3` in a container).
    One that is named without its place is looked for there, and brings bigtrain with it."""
    template: str | None = None
    """A batch script with the placeholders of `slurm/train.sbatch`; None: that one."""
    snapshot: bool = False
    """Run a copy of the code as it was at submission."""
    max_requeues: int = 20
    """How often the job is put back into the queue when it had to stop early."""
    spare_nodes: int = 0
    """Nodes more than the run needs: it goes on at once on one of them when another is lost."""

    @property
    def gpus_per_node(self) -> int | None:
        """GPUs of one node that the options ask for; None where they say nothing of it."""
        said = self.options.get("gpus-per-node")
        texts = said.split(",") if said else _gpus_of_gres(self.options.get("gres"))
        counts = [int(match[1]) for match in map(_GPU_COUNT.fullmatch, texts) if match]
        return sum(counts) if counts else None

    @property
    def new_starts(self) -> int:
        """How often the job may put itself back into the queue."""
        is_refused = "no-requeue" in self.options or "requeue" in self.left_out
        return 0 if is_refused else self.max_requeues

    @property
    def finds_bigtrain(self) -> bool:
        """Whether the nodes' Python has a bigtrain of its own: in a container, or where it is named
        without its place."""
        by_name = self.python is not None and not Path(self.python).is_absolute()
        return by_name or any(name.startswith("container") for name in self.options)


def read_settings(
    section: Mapping[str, Any], *, origins: Mapping[str, str] | None = None
) -> SlurmSettings:
    """The settings that `cluster.slurm` says: keys of ours, and any option of sbatch's.

    `origins` says where each key is from, for messages. ConfigError with every fault.
    """
    origins = origins or {}
    faults: list[str] = []
    ours: dict[str, Any] = {}
    others: dict[str, Any] = {}
    for key, value in section.items():
        name = key.replace("-", "_")
        if name not in _OWN_KEYS:
            others[key] = value
        elif value is not None:
            try:
                ours[name] = _OWN_KEYS[name](value)
            except ValueError as fault:
                faults.append(f"{place_of(key, origins)}: {fault}")
    try:
        options = read_options(others, origins=origins)
    except ConfigError as error:
        raise ConfigError([*faults, *error.faults]) from None
    left_out = frozenset(name for name, value in options.items() if value is False)
    if "no-kill" in left_out and ours.get("spare_nodes"):
        faults.append(f"{place_of('no_kill', origins)}: spare_nodes need it; leave out one of both")
    if faults:
        raise ConfigError(faults)
    said = {name: value for name, value in options.items() if value is not False}
    return SlurmSettings(options=said, left_out=left_out, **ours)


def _gpus_of_gres(gres: str | None) -> list[str]:
    """`a100:4` and `1` of `gpu:a100:4,nvme:1,gpu`: one GPU where no number is given."""
    items = [item.removeprefix("gres/").partition(":") for item in (gres or "").split(",")]
    named = [rest for kind, _, rest in items if kind == "gpu"]
    return [rest if rest.rpartition(":")[2].isdecimal() else "1" for rest in named]


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value.strip() or "\0" in value:
        raise ValueError(f"{value!r} is not text")
    return value


def _place(value: Any) -> str:
    """A file, or a name that is looked for later; `~` is the home of who submits."""
    text = _text(value)
    try:
        return str(Path(text).expanduser()) if text.startswith("~") else text
    except RuntimeError:
        raise ValueError(f"{value!r}: there is no such home directory") from None


def _words(value: Any) -> tuple[str, ...]:
    words = [value] if isinstance(value, str) else value
    if not isinstance(words, list) or not all(isinstance(word, str) and word for word in words):
        raise ValueError(f"{value!r} is not a list of module names")
    return tuple(words)


def _truth(value: Any) -> bool:
    value = {"true": True, "false": False}.get(value, value) if isinstance(value, str) else value
    if not isinstance(value, bool):
        raise ValueError(f"{value!r} is not true or false")
    return value


def _count(value: Any) -> int:
    value = int(value) if isinstance(value, str) and value.isdecimal() else value
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"{value!r} is not a whole number from 0 on")
    return value


def _setup(value: Any) -> str:
    for name, said in _ASSIGNMENT.findall(_text(value)):
        if holds_secret(name, said) and said[:1] not in _COMPUTED:
            raise ValueError(f"{name}: {SECRET_ADVICE}")
    if holds_token(value):
        raise ValueError(f"a token stands in it: {SECRET_ADVICE}")
    return str(value)


_OWN_KEYS = {
    "modules": _words,
    "setup": _setup,
    "python": _place,
    "template": _place,
    "snapshot": _truth,
    "max_requeues": _count,
    "spare_nodes": _count,
}
