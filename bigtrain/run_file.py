"""A run file's text as plain values, each with the line it stands on.

Hostile files end in one message: only plain YAML is read (no tags, no objects), and size, depth
and the number of values that aliases expand to are bounded.

Scalars follow YAML 1.2: `no` is text, not false, and `1e-4` is a number. `yes`, `no`, `on` and
`off` are understood where a field says that it takes true or false, and are refused inside free
mappings, where nobody could know what was meant.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import yaml

from bigtrain.errors import ConfigError
from bigtrain.small_files import read_small_text

KeyPath: TypeAlias = tuple[str, ...]

_MOST_BYTES = 1 << 20
_MOST_VALUES = 20_000
_MOST_DEPTH = 32
_FREE_DEPTH = 2
_AMBIGUOUS = frozenset({"yes", "no", "on", "off"})
_PLAIN_TAGS = frozenset(
    f"tag:yaml.org,2002:{name}" for name in ("str", "int", "float", "bool", "null", "map", "seq")
)


class _Loader(yaml.SafeLoader):
    """SafeLoader with the scalars of YAML 1.2's core schema."""

    # PyYAML keeps its resolvers on the class; an empty table forgets those of YAML 1.1.
    yaml_implicit_resolvers = {}  # noqa: RUF012


for _tag, _pattern, _first in (
    ("bool", r"^(?:true|True|TRUE|false|False|FALSE)$", "tTfF"),
    ("null", r"^(?:~|null|Null|NULL|)$", ["~", "n", "N", ""]),
    ("int", r"^[-+]?(?:0x[0-9a-fA-F]+|0|[1-9][0-9_]*)$", "-+0123456789"),
    (
        "float",
        r"^[-+]?(?:(?:[0-9][0-9_]*)?\.[0-9]+(?:[eE][-+]?[0-9]+)?|[0-9][0-9_]*\.(?:[eE][-+]?[0-9]+)?"
        r"|[0-9][0-9_]*[eE][-+]?[0-9]+|\.(?:inf|Inf|INF))$|^\.(?:nan|NaN|NAN)$",
        "-+0123456789.",
    ),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(_pattern), list(_first))


@dataclass(frozen=True, kw_only=True)
class RunFile:
    """What a file says: nested plain values, and where each key stands."""

    label: str
    """The file as the user named it."""
    values: dict[str, Any]
    lines: dict[KeyPath, int]
    faults: tuple[str, ...]
    """What can't be read, though the rest could."""


def read_run_file(path: Path, *, label: str) -> RunFile:
    """The values in the file at `path`. ConfigError where it is not YAML or not readable.

    `label` is the file's name in messages.
    """
    return parse_run_file(read_small_text(path, label=label, limit=_MOST_BYTES), label=label)


def parse_run_file(text: str, *, label: str) -> RunFile:
    """The values in a run file's text."""
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        reading = _Reading(loader, label)
        values = {} if node is None else reading.value(node, ())
    except yaml.MarkedYAMLError as error:
        raise ConfigError(_syntax_fault(error, label)) from None
    except ConfigError:
        raise
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"{label}: not a YAML file: {_one_line(error)}") from None
    except RecursionError:
        raise ConfigError(f"{label}: nested too deeply to be a run file") from None
    if not isinstance(values, dict):
        raise ConfigError(
            f"{label}:1: a run file holds sections (model, data, training, …), "
            f"and this holds a {type(values).__name__}"
        )
    return RunFile(label=label, values=values, lines=reading.lines, faults=tuple(reading.faults))


def parse_value(text: str, *, label: str) -> Any:
    """One value as YAML spells it, for `--set key=value`."""
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        reading = _Reading(loader, label)
        # One level down, so that a mapping given here is judged as one inside a section.
        value = None if node is None else reading.value(node, ("",))
    except ConfigError:
        raise
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{label}: {text!r} is not a value: {_one_line(error)}") from None
    if reading.faults:
        raise ConfigError(f"{label}: {text!r} is not a plain value")
    return value


class _Reading:
    """One walk over the nodes, which collects values, lines and faults."""

    def __init__(self, loader: _Loader, label: str) -> None:
        self.lines: dict[KeyPath, int] = {}
        self.faults: list[str] = []
        self._loader = loader
        self._label = label
        self._count = 0

    def value(self, node: yaml.Node, path: KeyPath) -> Any:
        self._count += 1
        if self._count > _MOST_VALUES or len(path) > _MOST_DEPTH:
            raise ConfigError(f"{self._label}: too many or too deeply nested values")
        if node.tag not in _PLAIN_TAGS:
            self._fault(node, path, f"the tag {node.tag} is not allowed; write a plain value")
            return None
        if isinstance(node, yaml.MappingNode):
            return dict(self._items(node, path))
        if isinstance(node, yaml.SequenceNode):
            return [self.value(item, (*path, str(i))) for i, item in enumerate(node.value)]
        return self._scalar(node, path)

    def _items(self, node: yaml.MappingNode, path: KeyPath) -> Iterator[tuple[str, Any]]:
        seen: dict[str, int] = {}
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                self._fault(key_node, path, "a key must be a plain word")
                continue
            key, line = key_node.value, key_node.start_mark.line + 1
            if key in seen:
                what = f"said twice (first on line {seen[key]}); keep one"
                self._fault(key_node, (*path, key), what)
                continue
            seen[key] = line
            self.lines.setdefault((*path, key), line)
            yield key, self.value(value_node, (*path, key))

    def _scalar(self, node: yaml.Node, path: KeyPath) -> Any:
        plain = isinstance(node, yaml.ScalarNode) and node.style is None
        if plain and len(path) > _FREE_DEPTH and str(node.value).lower() in _AMBIGUOUS:
            what = f"{node.value} could be true, false or text; write true, false or quotes"
            self._fault(node, path, what)
        value = self._loader.construct_object(node)  # type: ignore[no-untyped-call]
        if isinstance(value, float) and not math.isfinite(value):
            self._fault(node, path, f"{node.value} is not a finite number")
        return value

    def _fault(self, node: yaml.Node, path: KeyPath, what: str) -> None:
        where = f"{self._label}:{node.start_mark.line + 1}"
        self.faults.append(f"{where}: {'.'.join(path) or 'the file'}: {what}")


def _syntax_fault(error: yaml.MarkedYAMLError, label: str) -> str:
    mark = error.problem_mark or error.context_mark
    where = f"{label}:{mark.line + 1}" if mark else label
    return f"{where}: not YAML: {error.problem or error.context}"


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
