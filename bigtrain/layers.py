"""A run file, `--set` and flags laid over each other: one tree that knows where each value is from.

Faults are collected here too, so that all of them can be told at once, each with its place.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bigtrain.errors import ConfigError
from bigtrain.run_file import KeyPath, RunFile, parse_value

# `engine: fsdp` is short for `engine: {name: fsdp}`.
_SHORTHANDS: Mapping[str, str] = {
    "engine": "name",
    "model": "name",
    "tokenizer": "name",
    "data": "name",
}


# Two that can't both be true.
_OPPOSITES: Mapping[str, str] = {
    "training.bf16": "training.fp16",
    "training.fp16": "training.bf16",
}


@dataclass(frozen=True, kw_only=True)
class Override:
    """A value that wins over the run file's: `key` is dotted, as in `engine.shard`."""

    key: str
    value: Any
    origin: str


def parse_assignment(text: str) -> Override:
    """`section.key=value`, as `--set` is given, with the value in YAML."""
    key, separator, value = text.partition("=")
    key = key.strip()
    if not separator or not all(key.split(".")):
        raise ConfigError(f"--set {text}: write section.key=value, as in engine.name=fsdp")
    return Override(key=key, value=parse_value(value, label=f"--set {key}"), origin="--set")


class Layers:
    """The tree, the origin of each of its keys, and the faults found so far."""

    def __init__(self, *, label: str) -> None:
        self.values: dict[str, Any] = {}
        self.origins: dict[str, str] = {}
        """Dotted key → `run.yaml:12`, `--set`, `flag --engine`."""
        self.wrong: set[str] = set()
        """The last part of each key that a fault was noted of."""
        self._label = label
        self._faults: list[str] = []

    @classmethod
    def of_file(cls, file: RunFile) -> Layers:
        layers = cls(label=file.label)
        layers._faults.extend(file.faults)
        for path, line in file.lines.items():
            layers.origins[".".join(path)] = f"{file.label}:{line}"
        for key, value in file.values.items():
            layers.values[key] = layers._expanded((key,), value, f"{key}")
        return layers

    def put(self, override: Override) -> None:
        """Set one value; a mapping that was there is replaced as a whole."""
        path = tuple(override.key.split("."))
        value = self._expanded(path, override.value, override.key)
        self._forget(override.key)
        self._remember(path, value, override.origin)
        branch = self.values
        for key in path[:-1]:
            inner = branch.get(key)
            branch[key] = dict(inner) if isinstance(inner, Mapping) else {}
            branch = branch[key]
        branch[path[-1]] = value

    def fault(self, path: KeyPath, what: str) -> None:
        """Note what is wrong with the value at `path`, and how to mend it."""
        key = ".".join(path)
        self.wrong |= set(path[-1:])
        place = f"{self.origin(path)}: {key}" if key else self._label
        self._faults.append(f"{place}: {what}")

    def take_out(self, path: KeyPath) -> None:
        """Forget what is said at `path`."""
        *around, key = path
        branch = self.value(tuple(around))
        if isinstance(branch, dict):
            branch.pop(key, None)

    def faults(self, told: Iterable[str]) -> None:
        """Note faults that say themselves where they are."""
        self._faults.extend(told)

    def origin(self, path: KeyPath) -> str:
        """Where the key, or else the nearest one around it, was said."""
        for length in range(len(path), 0, -1):
            found = self.origins.get(".".join(path[:length]))
            if found is not None:
                return found
        return self._label

    def value(self, path: KeyPath) -> Any:
        """What is said at `path`; None where nothing is."""
        found: Any = self.values
        for key in path:
            found = found.get(key) if isinstance(found, Mapping) else None
        return found

    @property
    def has_faults(self) -> bool:
        return bool(self._faults)

    def told(self) -> list[str]:
        """All faults, in the order of the file's lines."""
        return in_order(self._faults)

    def raise_faults(self) -> None:
        """ConfigError with all faults, in the order of the file's lines, if there are any."""
        if self._faults:
            raise ConfigError(self.told())

    def _expanded(self, path: KeyPath, value: Any, key: str) -> Any:
        inner = _SHORTHANDS.get(path[0]) if len(path) == 1 else None
        if inner is None or not isinstance(value, str):
            return value
        self.origins[f"{key}.{inner}"] = self.origins.get(key, self._label)
        return {inner: value}

    def _forget(self, key: str) -> None:
        for old in [old for old in self.origins if old == key or old.startswith(f"{key}.")]:
            del self.origins[old]

    def _remember(self, path: KeyPath, value: Any, origin: str) -> None:
        for key in _leaves(path, value):
            self.origins[key] = origin
        for length in range(1, len(path)):  # the sections around it, where they are new
            self.origins.setdefault(".".join(path[:length]), origin)


def lay(
    file: RunFile | None,
    overrides: Sequence[Override],
    *,
    label: str,
    foreign: Sequence[Override] = (),
) -> Layers:
    """The file's values with `overrides` on top; of two for the same key the last one wins.

    `foreign` values come from another tool's config. They fill what nothing else says; where the
    file says another value, that is a fault, unless an override settles it.
    """
    layers = Layers.of_file(file) if file is not None else Layers(label=label)
    settled = {override.key for override in overrides}
    for value in foreign:
        if value.key not in settled:
            _fill(layers, value)
    for override in overrides:
        layers.put(override)
    return layers


def _fill(layers: Layers, value: Override) -> None:
    path = tuple(value.key.split("."))
    other = _OPPOSITES.get(value.key)
    said = layers.value(path)
    if value.value is False and said is None:
        return  # the default, said out loud: nothing to fill, but something to contradict
    if (value.key, said) == ("engine.name", "auto"):
        said = None
    if other is not None and value.value is True and layers.value(tuple(other.split("."))) is True:
        layers.fault(
            tuple(other.split(".")),
            f"true, but {value.origin} says {value.key.rpartition('.')[2]}; leave one out, or "
            f"settle it by --set {value.key}=false",
        )
    elif said is None:
        layers.put(value)
    elif said != value.value:
        layers.fault(
            path,
            f"{_spelled(said)}, but {value.origin} says {_spelled(value.value)}; leave one out, or "
            f"settle it by --set {value.key}=…",
        )


def _spelled(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else repr(value)


def _leaves(path: KeyPath, value: Any) -> Iterator[str]:
    yield ".".join(path)
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _leaves((*path, key), inner)


def plain_values(value: Any, path: KeyPath = ()) -> Iterator[tuple[KeyPath, Any]]:
    """Every value in a tree of mappings and lists, with where it stands."""
    if isinstance(value, (Mapping, list)):
        items = value.items() if isinstance(value, Mapping) else enumerate(value)
        for key, inner in items:
            yield from plain_values(inner, (*path, str(key)))
    else:
        yield path, value


def in_order(faults: Iterable[str]) -> list[str]:
    """By file and line, where they say one."""
    return sorted(faults, key=_by_line)


def _by_line(fault: str) -> tuple[str, int]:
    place = fault.split(": ", 1)[0]
    label, _, line = place.rpartition(":")
    return (label, int(line)) if line.isdigit() else (place, 0)
