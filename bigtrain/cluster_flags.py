"""The flags of `bigtrain launch` that say on which machines a run takes place.

They are a dataclass, and a decorator puts them into a command's signature, where typer finds them:
the command itself takes them as one argument.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from bigtrain.errors import ConfigError

if TYPE_CHECKING:
    from bigtrain.layers import Override


def _option(name: str, metavar: str | None, text: str) -> Any:
    return typer.Option(name, metavar=metavar, help=text)


@dataclass(frozen=True, kw_only=True)
class ClusterFlags:
    """What the user said of machines; None and empty where nothing was said."""

    nodes: Annotated[
        str | None, _option("--nodes", "N", "Machines. Default: 1. 2:4: elastic, without Slurm.")
    ] = None
    slurm: Annotated[bool, _option("--slurm", None, "Submit a Slurm job.")] = False
    partition: Annotated[str | None, _option("--partition", "NAME", "Slurm: the partition.")] = None
    time: Annotated[str | None, _option("--time", "[D-]HH:MM:SS", "Slurm: the time limit.")] = None
    sbatch: Annotated[
        list[str] | None,
        _option("--sbatch", "OPTION=VALUE", "Slurm: any option of sbatch. Repeat."),
    ] = None
    container_image: Annotated[
        str | None, _option("--container-image", "IMAGE", "Slurm: run in it (pyxis).")
    ] = None
    snapshot: Annotated[
        bool, _option("--snapshot", None, "Slurm: run a copy of the code as it is now.")
    ] = False
    signal: Annotated[
        str | None,
        _option("--signal", "SIG@SECONDS", "Slurm: the notice before the time limit."),
    ] = None
    max_requeues: Annotated[
        int | None, _option("--max-requeues", "N", "Slurm: new starts of the job.")
    ] = None
    sweep: Annotated[
        list[str] | None,
        _option("--sweep", "KEY=V1,V2", "Slurm: a job array, a run per value. Repeat."),
    ] = None
    node_rank: Annotated[
        int | None, _option("--node-rank", "K", "Without Slurm: which of them this is.")
    ] = None
    rdzv_endpoint: Annotated[
        str | None,
        _option("--rdzv-endpoint", "HOST:PORT", "Without Slurm: where machine 0 is."),
    ] = None
    interface: Annotated[
        str | None, _option("--interface", "NAME", "The network over which they meet.")
    ] = None

    def overrides(self) -> tuple[Override, ...]:
        """What they say in a run file's keys, but for the number of nodes."""
        from bigtrain.layers import Override

        said: list[tuple[str, Any, str]] = [
            ("cluster.slurm.partition", self.partition, "--partition"),
            ("cluster.slurm.time", self.time, "--time"),
            ("cluster.slurm.container_image", self.container_image, "--container-image"),
            ("cluster.slurm.snapshot", self.snapshot or None, "--snapshot"),
            ("cluster.slurm.signal", self.signal, "--signal"),
            ("cluster.slurm.max_requeues", self.max_requeues, "--max-requeues"),
            ("cluster.interface", self.interface, "--interface"),
        ]
        said += [
            (f"cluster.slurm.{k}", v, "--sbatch") for k, v in map(_assigned, self.sbatch or ())
        ]
        return tuple(
            Override(key=key, value=value, origin=f"flag {flag}")
            for key, value, flag in said
            if value is not None
        )

    def number_of_nodes(self) -> int | None:
        """None where nothing was said. ConfigError for a range, or what is no number."""
        if self.nodes is None:
            return None
        if not self.nodes.isdecimal() or int(self.nodes) < 1:
            raise ConfigError(f"flag --nodes: {self.nodes!r} is not a whole number from 1 on")
        return int(self.nodes)

    def refuse_slurms(self) -> None:
        """ConfigError where flags that only make sense for a job are given without --slurm."""
        named = {
            "--partition": self.partition,
            "--time": self.time,
            "--sbatch": self.sbatch,
            "--container-image": self.container_image,
            "--snapshot": self.snapshot,
            "--signal": self.signal,
            "--max-requeues": self.max_requeues,
            "--sweep": self.sweep,
        }
        faults = [
            f"flag {flag}: it is for a Slurm job; add --slurm, or leave it out"
            for flag, value in named.items()
            if value
        ]
        if faults:
            raise ConfigError(faults)


def _assigned(text: str) -> tuple[str, Any]:
    from bigtrain.slurm.options import parse_assignment

    name, value = parse_assignment(text)
    if "." in name:
        raise ConfigError(f"--sbatch {text}: an option of sbatch's has no dot in its name")
    return name, value


def with_cluster_flags(command: Callable[..., None]) -> Callable[..., None]:
    """`command(…, where: ClusterFlags)` as a command that has all these flags of its own."""
    hints = get_type_hints(ClusterFlags, include_extras=True)
    flags = [
        inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=field.default,
            annotation=hints[field.name],
        )
        for field in fields(ClusterFlags)
    ]
    signature = inspect.signature(command, eval_str=True)
    own = [
        parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)
        for name, parameter in signature.parameters.items()
        if name != "where"
    ]

    @functools.wraps(command)
    def with_flags(**values: Any) -> None:
        where = ClusterFlags(**{flag.name: values.pop(flag.name) for flag in flags})
        command(**values, where=where)

    with_flags.__signature__ = inspect.Signature([*own, *flags])  # type: ignore[attr-defined]
    with_flags.__annotations__ = {flag.name: flag.annotation for flag in (*own, *flags)}
    del with_flags.__wrapped__  # type: ignore[attr-defined]  # typer would look at its signature
    return with_flags
