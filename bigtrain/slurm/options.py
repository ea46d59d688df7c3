"""Every option of sbatch: which exist, which take a value, and which bigtrain sets itself.

A misspelt option is refused here, with the nearest right one, rather than by a queue that is an
hour away or, in a `#SBATCH` line after the first command, by nobody.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from bigtrain.arguments.values import did_you_mean
from bigtrain.errors import ConfigError
from bigtrain.secrecy import SECRET_ADVICE, holds_token

Takes: TypeAlias = Literal["value", "maybe", "nothing"]

# From sbatch(1) of 22.05, and what releases up to 25.05 added. Short names are understood too.
_TABLE: Mapping[Takes, str] = {
    "value": """
        account/A acctg-freq array/a batch bb bbf begin/b chdir/D cluster-constraint clusters/M
        comment constraint/C container container-id core-spec/S cores-per-socket cpu-freq
        cpus-per-gpu cpus-per-task/c deadline delay-boot dependency/d distribution/m error/e
        exclude/x export export-file extra extra-node-info/B gid gpu-bind gpu-freq gpus/G
        gpus-per-node gpus-per-socket gpus-per-task gres gres-flags hint input/i job-name/J
        kill-on-invalid-dep licenses/L mail-type mail-user mcs-label mem mem-bind mem-per-cpu
        mem-per-gpu mincpus network nodefile/F nodelist/w nodes/N ntasks/n ntasks-per-core
        ntasks-per-gpu ntasks-per-node ntasks-per-socket oom-kill-step open-mode output/o
        partition/p power prefer priority profile qos/q reservation resources segment signal
        sockets-per-node switches thread-spec threads-per-core time/t time-min tmp tres-bind
        tres-per-task uid wait-all-nodes wckey wrap
    """,
    "maybe": "exclusive get-user-env nice no-kill/k propagate",
    "nothing": """
        consolidate-segments contiguous help/h hold/H ignore-pbs no-requeue overcommit/O
        oversubscribe/s parsable quiet/Q reboot requeue spread-job stepmgr test-only usage
        use-min-nodes verbose/v version/V wait/W
    """,
}

_OURS: Mapping[str, str] = {
    **dict.fromkeys(("nodes", "ntasks", "ntasks-per-node"), "it follows from --nodes"),
    **dict.fromkeys(
        ("ntasks-per-core", "ntasks-per-gpu", "ntasks-per-socket", "overcommit", "tres-per-task"),
        "bigtrain starts one task on each node, which starts the ranks; use --procs-per-node",
    ),
    "gpus": "it counts over all nodes; use gpus-per-node",
    "gpus-per-task": "a task is a node here; use gpus-per-node",
    "array": "it follows from --sweep",
    "chdir": "a run keeps the directory it was submitted from",
    "export": "the job needs the variables of the shell it is submitted from",
    "open-mode": "a requeued run goes on in the same log",
    "wrap": "bigtrain writes the batch script",
    **dict.fromkeys(
        ("help", "parsable", "quiet", "test-only", "usage", "verbose", "version", "wait"),
        "it changes what sbatch prints, which bigtrain reads",
    ),
    **dict.fromkeys(("uid", "gid"), "a run belongs to who submits it"),
}

# pyxis adds these to srun; enroot then runs the task inside the image.
_PYXIS = (
    *("container-image", "container-mounts", "container-workdir", "container-name"),
    *("container-save", "container-env", "container-entrypoint", "container-mount-home"),
    *("container-remap-root", "container-writable", "container-readonly"),
    *("no-container-entrypoint", "no-container-mount-home", "no-container-remap-root"),
)


_TIME = (
    re.compile(r"\d+(:\d+){0,2}|\d+-\d+(:\d+){0,2}|unlimited|infinite|-1", re.IGNORECASE),
    "a time as Slurm knows it: MINUTES, MINUTES:SECONDS, HH:MM:SS, DAYS-HH, DAYS-HH:MM or "
    "DAYS-HH:MM:SS, as in 24:00:00 or 1-00",
)
# What sbatch itself would misread without a word, or take for something that never reaches the run.
_FORMS: Mapping[str, tuple[re.Pattern[str], str]] = {
    "time": _TIME,
    "time-min": _TIME,
    "signal": (
        re.compile(r"(R:)?((SIG)?(USR1|USR2|TERM)|10|12|15)(@(\d{1,4}|[1-5]\d{4}))?", re.I),
        "SIG@SECONDS, as in USR2@600: USR1 and USR2 save and start the run again, TERM saves and "
        "ends it (with B: in front, only the batch script would hear of it)",
    ),
}


@dataclass(frozen=True, kw_only=True)
class SbatchOption:
    """One option of sbatch's, by its long name."""

    name: str
    takes: Takes


def _read_table() -> tuple[dict[str, SbatchOption], dict[str, str]]:
    options, short_names = {}, {}
    for takes, words in _TABLE.items():
        for word in words.split():
            name, _, short = word.partition("/")
            options[name] = SbatchOption(name=name, takes=takes)
            if short:
                short_names[short] = name
    return options, short_names


OPTIONS, _LONG_NAMES = _read_table()


Options: TypeAlias = dict[str, str | Literal[False] | None]
"""Long name → value; None for an option that is said without one, False for one that is not to be
there, whoever would set it."""


def read_options(said: Mapping[str, Any], *, origins: Mapping[str, str]) -> Options:
    """The options in the order they were said; `origins` says where each key of `said` is from.

    Raises ConfigError with every fault.
    """
    faults: list[str] = []
    options: Options = {}
    for key, value in said.items():
        try:
            name = _long_name(key)
            options.pop(name, None)  # in another spelling
            options[name] = _read_value(name, value)
        except ValueError as fault:
            faults.append(f"{place_of(key, origins)}: {fault}")
    if faults:
        raise ConfigError(faults)
    return options


def place_of(key: str, origins: Mapping[str, str]) -> str:
    """Where an option was said, and its whole name."""
    origin = origins.get(key)
    return f"{origin}: cluster.slurm.{key}" if origin else f"cluster.slurm.{key}"


def is_container_option(name: str) -> bool:
    """Whether it is srun's to be told: sbatch would run the batch script in the container."""
    return name in _PYXIS


def parse_assignment(text: str) -> tuple[str, Any]:
    """`option=value` or `option`, as `--sbatch` is given; dashes in front are allowed."""
    name, separator, value = text.lstrip("-").partition("=")
    if not name.strip():
        raise ConfigError(f"--sbatch {text}: write option=value, as in qos=high")
    return name.strip(), value if separator else True


def _long_name(key: str) -> str:
    name = key.replace("_", "-")
    name = _LONG_NAMES.get(name, name)
    if name in _OURS:
        raise ValueError(f"bigtrain sets it itself: {_OURS[name]}")
    if name not in OPTIONS and name not in _PYXIS:
        known = (*OPTIONS, *_PYXIS)
        raise ValueError(f"sbatch has no such option{did_you_mean(name, known)}")
    return name


def _read_value(name: str, value: Any) -> str | Literal[False] | None:
    takes: Takes = OPTIONS[name].takes if name in OPTIONS else "maybe"
    if takes != "value" and isinstance(value, str):  # as it is typed behind --sbatch
        value = {"true": True, "false": False}.get(value.strip().lower(), value)
    if value is False:
        return False
    if value is True:
        if takes == "value":
            raise ValueError("it needs a value")
        return None
    if takes == "nothing":
        raise ValueError(f"it takes no value, and has {value!r}; use true or false")
    text = _as_text(value)
    if not text or not text.isprintable():
        raise ValueError(f"{value!r} can't be written in one line of a script")
    if holds_token(text):
        raise ValueError(SECRET_ADVICE)
    form, advice = _FORMS.get(name, (None, ""))
    if form is not None and not form.fullmatch(text):
        raise ValueError(f"{text!r} is not {advice}")
    return text


def _as_text(value: Any) -> str:
    if isinstance(value, (str, int, float)):
        return str(value).strip()
    if isinstance(value, Sequence) and all(isinstance(item, (str, int)) for item in value):
        return ",".join(str(item) for item in value)
    raise ValueError(f"{value!r} is neither text, a number nor a list of these")
