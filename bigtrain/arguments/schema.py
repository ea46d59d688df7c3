"""The fields of TrainingArguments, read from the installed sources without importing them.

Importing transformers takes seconds; parsing two of its files takes a tenth of one. So names,
types, defaults and help come by `ast` from the installed `training_args.py`, with our own fields
from `bigtrain/trainer/arguments.py` on top, and never from a copy that could grow stale.
"""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, TypeAlias

from bigtrain.errors import ConfigError

Kind: TypeAlias = Literal["int", "float", "bool", "str", "list", "dict", "object"]
_PLAIN_KINDS: Mapping[str, Kind] = {
    "int": "int",
    "float": "float",
    "bool": "bool",
    "str": "str",
    "list": "list",
    "dict": "dict",
}
# Declared by a call, which is not made here; a test compares them with the real ones.
_LOG_LEVELS = ("detail", "debug", "info", "warning", "error", "critical", "passive")
_CALLED_CHOICES = {"log_level": _LOG_LEVELS, "log_level_replica": _LOG_LEVELS}
_OUR_ARGUMENTS = Path(__file__).parent.parent / "trainer" / "arguments.py"


@dataclass(frozen=True, kw_only=True)
class Field:
    """One argument, as its dataclass declares it."""

    name: str
    annotation: str
    kinds: tuple[Kind, ...]
    """What a value may be. `object`: a Python object that no run file can spell."""
    optional: bool
    default: Any
    help: str = ""
    choices: tuple[str, ...] = ()
    """The strings that are allowed; empty where any is."""


Schema: TypeAlias = Mapping[str, Field]


@lru_cache(maxsize=1)
def load_schema() -> Schema:
    """Every field of `bigtrain.TrainingArguments`, in the order of declaration."""
    folder = installed_transformers()
    enums = {**enum_values(folder / "trainer_utils.py"), **enum_values(folder / "training_args.py")}
    fields = read_fields(folder / "training_args.py", enums=enums)
    return fields | read_fields(_OUR_ARGUMENTS, enums=enums)


def read_fields(source: Path, *, enums: Mapping[str, tuple[str, ...]]) -> dict[str, Field]:
    """The fields of the class `TrainingArguments` that the file `source` defines."""
    body = class_body(parse(source), "TrainingArguments", source)
    constants = dict(class_constants(body))
    return {
        node.target.id: _read_field(node.target.id, node, constants=constants, enums=enums)
        for node in body
        if isinstance(node, ast.AnnAssign)
        and isinstance(node.target, ast.Name)
        and not ast.unparse(node.annotation).startswith("ClassVar")
    }


def defaults(schema: Schema) -> dict[str, Any]:
    """Name to default value, for every field."""
    return {name: field.default for name, field in schema.items()}


def installed_transformers() -> Path:
    """Its folder. ConfigError where there is none."""
    spec = importlib.util.find_spec("transformers")  # finds a top-level package without running it
    if spec is None or spec.origin is None:
        raise ConfigError("transformers is not installed; pip install transformers")
    return Path(spec.origin).parent


@lru_cache(maxsize=8)
def parse(source: Path) -> ast.Module:
    """A source of transformers or of ours."""
    try:
        return ast.parse(source.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{source} can't be read ({error.strerror}); reinstall it") from error


def class_body(module: ast.Module, name: str, source: Path) -> list[ast.stmt]:
    """What stands in the class `name`. ConfigError where the module has none."""
    for node in module.body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            return node.body
    raise ConfigError(f"{source} defines no class {name}; its version is not one that is supported")


def class_constants(body: list[ast.stmt]) -> Iterator[tuple[str, Any]]:
    """Plain names that the class body assigns, also under `if`; a later assignment wins.

    The conditions ask for a torch that is there and recent, and so hold wherever training runs.
    """
    for statement in body:
        for node in ast.walk(statement):
            if not (isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)):
                continue
            if isinstance(node.targets[0], ast.Name):
                yield node.targets[0].id, node.value.value


def enum_values(source: Path) -> dict[str, tuple[str, ...]]:
    """Enum class name → its string values."""
    return {
        node.name: tuple(value for _, value in class_constants(node.body))
        for node in parse(source).body
        if isinstance(node, ast.ClassDef)
        and any("Enum" in ast.unparse(base) for base in node.bases)
    }


def _read_field(
    name: str,
    node: ast.AnnAssign,
    *,
    constants: Mapping[str, Any],
    enums: Mapping[str, tuple[str, ...]],
) -> Field:
    members = list(_union_members(node.annotation))
    keywords = _field_keywords(node.value)
    metadata = _metadata(keywords.get("metadata"), constants)
    of_enums = [choice for member in members for choice in enums.get(ast.unparse(member), ())]
    return Field(
        name=name,
        annotation=ast.unparse(node.annotation),
        kinds=tuple(dict.fromkeys(kind for member in members for kind in _kinds(member, enums))),
        optional=any(ast.unparse(member) == "None" for member in members),
        default=_default(node.value, keywords, constants),
        help=" ".join(str(metadata.get("help", "")).split()),
        choices=_CALLED_CHOICES.get(name) or tuple(metadata.get("choices") or of_enums),
    )


def _union_members(annotation: ast.expr) -> Iterator[ast.expr]:
    if isinstance(annotation, ast.BinOp) and isinstance(annotation.op, ast.BitOr):
        yield from _union_members(annotation.left)
        yield from _union_members(annotation.right)
    elif isinstance(annotation, ast.Subscript) and ast.unparse(annotation.value) == "Optional":
        yield from _union_members(annotation.slice)
        yield ast.Constant(None)
    elif isinstance(annotation, ast.Subscript) and ast.unparse(annotation.value) == "Union":
        members = annotation.slice
        for member in members.elts if isinstance(members, ast.Tuple) else [members]:
            yield from _union_members(member)
    elif isinstance(annotation, ast.Constant) and isinstance(annotation.value, str):
        yield from _union_members(ast.parse(annotation.value, mode="eval").body)
    else:
        yield annotation


def _kinds(member: ast.expr, enums: Mapping[str, tuple[str, ...]]) -> Iterator[Kind]:
    outer = member.value if isinstance(member, ast.Subscript) else member
    text = ast.unparse(outer).lower() if isinstance(outer, ast.Name) else ""
    if text in _PLAIN_KINDS:
        yield _PLAIN_KINDS[text]
    elif ast.unparse(outer) in enums:
        yield "str"
    elif text == "literal":
        literal = ast.literal_eval(member.slice) if isinstance(member, ast.Subscript) else ()
        for value in literal if isinstance(literal, tuple) else (literal,):
            yield _PLAIN_KINDS[type(value).__name__]
    elif ast.unparse(member) != "None":
        yield "object"


def _field_keywords(value: ast.expr | None) -> dict[str, ast.expr]:
    if isinstance(value, ast.Call):
        return {keyword.arg: keyword.value for keyword in value.keywords if keyword.arg}
    return {}


def _metadata(node: ast.expr | None, constants: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of a `metadata={…}` that are literals; the others are left out."""
    if not isinstance(node, ast.Dict):
        return {}
    pairs = zip(node.keys, node.values, strict=True)
    found = {_literal(key, constants): _literal(value, constants) for key, value in pairs}
    return {key: value for key, value in found.items() if value is not None}


def _default(
    value: ast.expr | None, keywords: Mapping[str, ast.expr], constants: Mapping[str, Any]
) -> Any:
    if not isinstance(value, ast.Call):
        return _literal(value, constants)
    factory = keywords.get("default_factory")
    if factory is not None:
        return {"list": [], "dict": {}}.get(ast.unparse(factory))
    return _literal(keywords.get("default"), constants)


def _literal(node: ast.expr | None, constants: Mapping[str, Any]) -> Any:
    """The value that an expression spells; None where it is not a literal."""
    if node is None:
        return None
    if isinstance(node, ast.Name):
        return constants.get(node.id)
    try:
        return ast.literal_eval(node)
    except ValueError:
        return None
