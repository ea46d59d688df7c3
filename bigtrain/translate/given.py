"""What another tool's config says of the engine, in our words: read first, so that it can be
compared with what was said here, and be shown with its origin."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

from bigtrain.translate.config import EngineOptions

Field: TypeAlias = Literal["deepspeed", "fsdp", "fsdp_config"]


@dataclass(frozen=True, kw_only=True)
class GivenOption:
    """One engine option that a given config speaks of."""

    option: str
    """The field of EngineOptions."""
    value: Any
    """As EngineOptions has it; None where the config says that there is to be none."""
    field: Field
    """The argument that holds the config."""
    key: str
    """Its key in the config."""
    spelled: Any
    """Its value there."""


def merge(options: EngineOptions, given: Iterable[GivenOption]) -> EngineOptions:
    """`options` with what is given, where they themselves say nothing."""
    unsaid = {said.option: said.value for said in given if getattr(options, said.option) is None}
    return replace(options, **unsaid)


def conflicts(
    options: EngineOptions, given: Iterable[GivenOption], *, origins: Mapping[str, str]
) -> Iterator[tuple[str, str]]:
    """(argument, what contradicts what, and the ways out)."""
    first: dict[str, GivenOption] = {}
    for said in given:
        other = first.setdefault(said.option, said)
        if other.value != said.value:
            yield (
                said.field,
                f"{said.key} is {shown(said.spelled)} there, but {other.field}'s {other.key} is "
                f"{shown(other.spelled)}; neither wins: leave one out",
            )
        ours = getattr(options, said.option)
        if ours is not None and ours != said.value:
            key = f"engine.{said.option}"
            place = f" ({origins[key]})" if key in origins else ""
            yield (
                said.field,
                f"{said.key} is {shown(said.spelled)} there, but {key} is {shown(ours)}{place}; "
                "neither wins: make them equal, or leave one out",
            )


def shown(value: Any) -> str:
    """As a file has it."""
    if isinstance(value, tuple):
        return ",".join(value)
    return str(value).lower() if isinstance(value, bool) else str(value)
