"""The plan of a run: everything decided, frozen, and the one file that crosses processes.

It is written as JSON to `<output_dir>/plans/attempt-NN.json`, found by every process through the
variable `BIGTRAIN_PLAN`, and is also the record of the run.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from bigtrain.errors import ConfigError, LaunchError
from bigtrain.secrecy import SECRET_ADVICE, holds_secret
from bigtrain.topology import Topology
from bigtrain.translate.config import (
    ArgumentFate,
    DdpSettings,
    DeepSpeedSettings,
    EngineConfig,
    EngineOptions,
    EngineSettings,
    FsdpSettings,
    SingleSettings,
)

PLAN_VARIABLE = "BIGTRAIN_PLAN"
_FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class RunPlan:
    """All that a run needs to know. `RunPlan.from_json(plan.to_json()) == plan`, exactly."""

    name: str
    kind: Literal["run_file", "script"]
    source: str
    """Absolute path of the run file or of the user's script."""
    script_args: tuple[str, ...] = ()
    working_dir: str
    topology: Topology
    device: Literal["cpu", "cuda"]
    engine: EngineConfig
    options: EngineOptions = field(default_factory=EngineOptions)
    """What was asked of the engine beyond TrainingArguments, here or in a given config."""
    fates: tuple[ArgumentFate, ...] = ()
    model: Mapping[str, Any] = field(default_factory=dict)
    tokenizer: Mapping[str, Any] = field(default_factory=dict)
    data: Mapping[str, Any] = field(default_factory=dict)
    training: Mapping[str, Any] = field(default_factory=dict)
    """TrainingArguments fields that were set or derived, with whole values."""
    output_dir: str
    attempt: int = 1
    run_id: str = ""
    """Borne by this run's checkpoints, and the same in all attempts that go on with the run. Ranks
    that derive their plan themselves take rank 0's."""
    begun_anew: str = ""
    """When the run last began anew (`--resume never`), as ISO 8601: older checkpoints of the
    directory are not its own. Empty: it never has."""
    resume: str = "auto"
    """`auto`, `never`, the absolute path of a checkpoint, or `script`: as the script says."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """Set before any rank's interpreter starts. Never holds a secret's value."""
    start_method: Literal["fork", "fresh"] = "fork"
    start_reason: str = ""
    """Why this start method was taken, where it was not asked for."""
    preload: tuple[str, ...] = ()
    """Modules that the fork server imports once per node."""
    threads_per_rank: int = 1
    max_restarts: int = 0
    slurm: Mapping[str, Any] = field(default_factory=dict)
    """`cluster.slurm` as it was said: how the run becomes a job."""
    interface: str | None = None
    """The only network interface over which nodes meet; None: whichever all of them reach."""
    join_timeout_s: int = 600
    """How long all nodes have to come."""
    stop_grace_s: int | None = None
    """From SIGTERM until ranks that are still there are killed; None: 30 s, and in a step of
    Slurm's as long as Slurm itself leaves."""
    origins: Mapping[str, str] = field(default_factory=dict)
    """`section.key` → where its value was said: `flag --engine`, `--set`, `run.yaml:12`.

    What was left to its default is not in it.
    """

    def __post_init__(self) -> None:
        secrets = [name for name, value in self.environment.items() if holds_secret(name, value)]
        if secrets:
            raise ConfigError([f"{name}: {SECRET_ADVICE}" for name in secrets])

    def to_json(self) -> str:
        """The whole plan as text. `from_json` gives back an equal plan."""
        content = dataclasses.asdict(self)
        said = {key: value for key, value in content["options"].items() if value is not None}
        return json.dumps(
            {"format": _FORMAT, **content, "options": said}, indent=2, allow_nan=False
        )

    @classmethod
    def from_json(cls, text: str) -> RunPlan:
        """The plan that `to_json` wrote. ConfigError where `text` is not one."""
        try:
            content = dict(json.loads(text))
            written = content.pop("format")
            if written != _FORMAT:
                raise ConfigError(
                    f"the plan has format {written}, and this bigtrain reads format {_FORMAT}; "
                    "use the version of bigtrain that wrote it"
                )
            return cls(**_decoded(content))
        except ConfigError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ConfigError(f"this is not a plan of bigtrain's: {error!r}") from error


def current_plan(environment: Mapping[str, str]) -> RunPlan | None:
    """The plan of the run that a process with this environment belongs to, if it has one."""
    path = environment.get(PLAN_VARIABLE)
    return read_plan(Path(path)) if path else None


def read_plan(path: Path) -> RunPlan:
    """The plan in a file. ConfigError where it can't be read or is not one."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the plan {path} can't be read: {error}") from error
    try:
        return RunPlan.from_json(text)
    except ConfigError as error:
        raise ConfigError([f"{path}: {fault}" for fault in error.faults]) from error


def write_plan(plan: RunPlan, path: Path) -> None:
    """Write a plan so that a reader sees all of it or none; never over another attempt's.

    Only its owner may read it: whatever a command line held is in it.
    LaunchError where `path` exists: then another launch has taken the same attempt.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LaunchError(
            f"output_dir: {path.parent} can't be made: {error.strerror}; give another --output-dir"
        ) from None
    staged = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(staged, "w", encoding="utf-8", opener=_owners_alone) as file:
            file.write(plan.to_json() + "\n")
        _claim(staged, path)
    except FileExistsError:
        raise LaunchError(
            f"{path} exists already: another launch into this directory started just now; "
            "wait for it, or give another --output-dir"
        ) from None
    finally:
        staged.unlink(missing_ok=True)


def _owners_alone(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def _claim(staged: Path, path: Path) -> None:
    try:
        os.link(staged, path)
    except FileExistsError:
        raise
    except OSError:
        # A file system without hard links: created empty and exclusively, then replaced.
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        staged.replace(path)


_SETTINGS: Mapping[str, type[Any]] = {
    "single": SingleSettings,
    "ddp": DdpSettings,
    "fsdp": FsdpSettings,
    "zero1": DeepSpeedSettings,
    "zero2": DeepSpeedSettings,
    "zero3": DeepSpeedSettings,
}


def _decoded(content: dict[str, Any]) -> dict[str, Any]:
    """JSON's lists and objects as the tuples and dataclasses that they were."""
    engine = dict(content["engine"])
    settings: EngineSettings = _SETTINGS[engine["name"]](**_tuples(engine["settings"]))
    return {
        **content,
        "topology": Topology(**content["topology"]),
        "engine": EngineConfig(**{**engine, "settings": settings}),
        "options": EngineOptions(**_tuples(content.get("options", {}))),
        "fates": tuple(ArgumentFate(**fate) for fate in content["fates"]),
        "script_args": tuple(content["script_args"]),
        "preload": tuple(content["preload"]),
    }


def _tuples(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
