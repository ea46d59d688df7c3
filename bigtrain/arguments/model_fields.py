"""The fields of a model's config class, read from the installed transformers without importing it.

So a misspelt key of `model.config` or widths that don't divide are named before anything starts,
and so is a model's directory whose config.json transformers could not load.
"""

from __future__ import annotations

import ast
import importlib.util
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from bigtrain.arguments.values import did_you_mean
from bigtrain.errors import ConfigError
from bigtrain.small_files import read_small_text

_MAPPING = ("models/auto/auto_mappings.py", "models/auto/configuration_auto.py")
_CAUSAL = ("models/auto/modeling_auto.py",)
_BASES = ("PreTrainedConfig", "PretrainedConfig")
# What a config takes besides its own fields: older spellings that transformers still converts.
ALSO_TAKEN = frozenset({"rope_theta", "rope_scaling", "partial_rotary_factor"})
_KINDS: Mapping[str, tuple[type, ...]] = {
    "int": (int,),
    "float": (int, float),
    "bool": (bool,),
    "str": (str,),
    "list": (list,),
    "dict": (dict,),
    "None": (type(None),),
}
_KIND_WORDS = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "str": "text",
    "list": "a list",
    "dict": "a mapping",
}
_LAYERS, _MOST_LAYERS = "num_hidden_layers", 2000
_POSITIONS = "max_position_embeddings"
_COUNTS = (_LAYERS, "vocab_size", "intermediate_size")


@dataclass(frozen=True, kw_only=True)
class ConfigClass:
    """A config class: its fields with their annotations, and the defaults that are literals."""

    annotations: Mapping[str, str]
    defaults: Mapping[str, Any]
    other_names: Mapping[str, str]
    """Names by which a field can be said as well (`hidden_size` for GPT-2's `n_embd`)."""
    divides_hidden: bool
    """Whether it demands that the heads divide the hidden size, whatever `head_dim` says."""


def config_faults(
    config: Mapping[str, Any], *, sequence_length: int = 0, is_default: bool = False
) -> Iterator[tuple[str, str]]:
    """(key of `model.config`, what is wrong and the fix); nothing for a class that isn't known."""
    model_type = str(config.get("model_type"))
    known = _class_names()
    if known and model_type not in known:
        yield "model_type", f"{model_type!r} is unknown{did_you_mean(model_type, known)}"
        return
    if why := _no_causal_model(model_type):
        yield "model_type", why
        return
    kind = config_class(model_type)
    if kind is None:
        return
    yield from _unknown(config, kind)
    mistyped = dict(_mistyped(config, kind))
    yield from mistyped.items()
    if not mistyped:
        whole = _by_first_name({**kind.defaults, **config}, kind)
        yield from _indivisible(config, whole, kind)
        if why := too_deep(config):
            yield _said_as(_LAYERS, config, kind), why
        if why := too_long(config, sequence_length, is_default=is_default):
            yield _said_as(_POSITIONS, config, kind), why


def read_config(folder: Path) -> dict[str, Any]:
    """The config of the model in a directory; empty where there is none that can be read."""
    try:
        config = json.loads(read_small_text(folder / "config.json", label=""))
    except (ConfigError, ValueError, RecursionError):
        return {}
    return config if isinstance(config, dict) else {}


def stored_faults(config: Mapping[str, Any], *, runs_code: bool) -> Iterator[str]:
    """What is wrong with a stored config, with which transformers could not load it. Keys that it
    has beyond its class are no fault; `runs_code`: it may bring its own class."""
    model_type = config.get("model_type")
    known = _class_names()
    if runs_code and "auto_map" in config:
        return
    if not isinstance(model_type, str):
        yield "config.json is no JSON object with a model_type"
    elif known and model_type not in known:
        code = "; model.trust_remote_code: true runs the code that comes with it"
        hint = code if "auto_map" in config else did_you_mean(model_type, known)
        yield f"config.json: model_type: {model_type!r:.80} is unknown{hint}"
    elif why := _no_causal_model(model_type):
        yield f"config.json: model_type: {why}"
    elif kind := config_class(model_type):
        yield from (f"config.json: {key}: {why}" for key, why in _mistyped(config, kind))
        if why := too_deep(config):
            yield f"config.json: {_said_as(_LAYERS, config, kind)}: {why}"


def too_long(config: Mapping[str, Any], sequence_length: int, *, is_default: bool = False) -> str:
    """What is wrong where sequences are longer than the model has positions; else empty.
    `is_default`: nobody has said how long they are."""
    positions = _of_text(config).get(_POSITIONS)
    if not isinstance(positions, int) or positions >= sequence_length:
        return ""
    return (
        f"the model has {positions} positions ({_POSITIONS}), but data.sequence_length is "
        f"{sequence_length}{' by default' * is_default}; make one fit the other"
    )


def too_deep(config: Mapping[str, Any]) -> str:
    """What is wrong where there are more layers than a plan can go through; else empty."""
    layers = _of_text(config).get(_LAYERS)
    if not isinstance(layers, int) or layers <= _MOST_LAYERS:
        return ""
    return f"{layers} layers are too many; give at most {_MOST_LAYERS}"


def _of_text(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The config of the language model, whole, with every field by its first name."""
    text = config.get("text_config")
    own = text if isinstance(text, Mapping) else config
    kind = config_class(str(own.get("model_type")))
    return _by_first_name({**kind.defaults, **own}, kind) if kind else own


@lru_cache(maxsize=8)
def config_class(model_type: str) -> ConfigClass | None:
    """The class of a `model_type`; None where it can't be read."""
    name, folder = _class_names().get(model_type), _installed()
    if name is None or folder is None:
        return None
    module = _special_modules().get(model_type, model_type.replace("-", "_"))
    return _read_class(folder / "models" / module / f"configuration_{module}.py", name)


def _unknown(config: Mapping[str, Any], kind: ConfigClass) -> Iterator[tuple[str, str]]:
    own = {*kind.annotations, *kind.other_names, *ALSO_TAKEN, "model_type"}
    strange = [key for key in config if key not in own]
    known = own | set(_base_fields()) if strange else own
    for key in strange:
        if key not in known:
            yield key, f"unknown key{did_you_mean(key, sorted(known))}"


def _mistyped(config: Mapping[str, Any], kind: ConfigClass) -> Iterator[tuple[str, str]]:
    for key, value in config.items():
        annotation = kind.annotations.get(kind.other_names.get(key, key), "")
        words = [word.strip().partition("[")[0] for word in annotation.split("|")]
        if not annotation or not set(words) <= _KINDS.keys():
            continue
        if not any(_is(value, word) for word in words):
            wanted = " or ".join(_KIND_WORDS[word] for word in words if word in _KIND_WORDS)
            yield key, f"{value!r:.200} is not {wanted}"


def _is(value: Any, word: str) -> bool:
    if isinstance(value, bool):
        return word == "bool"
    return isinstance(value, _KINDS[word])


def _indivisible(
    config: Mapping[str, Any], whole: Mapping[str, Any], kind: ConfigClass
) -> Iterator[tuple[str, str]]:
    """Hidden size by heads, and heads by key-value heads."""

    def read(key: str) -> int | None:
        value = whole.get(key)
        return value if isinstance(value, int) and not isinstance(value, bool) else None

    hidden, heads = read("hidden_size"), read("num_attention_heads")
    counts = {key: read(key) for key in _COUNTS if _said_as(key, config, kind) in config}
    for key, value in {"hidden_size": hidden, "num_attention_heads": heads, **counts}.items():
        if value is not None and value < 1:
            yield _said_as(key, config, kind), f"{value} is too small; it must be at least 1"
            return
    needs_it = kind.divides_hidden or whole.get("head_dim") is None
    if hidden and heads and needs_it and hidden % heads:
        yield (
            _said_as("num_attention_heads", config, kind),
            f"{heads} heads do not divide the hidden size {hidden}; use {_divisors(hidden, heads)}",
        )
    groups = read("num_key_value_heads")
    if heads and groups is not None and (groups < 1 or heads % groups):
        said = "" if "num_key_value_heads" in config else " (its default)"
        yield (
            "num_key_value_heads",
            f"{groups}{said} do not divide the {heads} attention heads; use "
            f"{_divisors(heads, groups)}",
        )


def _divisors(number: int, near: int) -> str:
    """Those next to `near`."""
    found = [n for n in range(1, number + 1) if number % n == 0]
    below = [n for n in found if n < near][-1:]
    return " or ".join(map(str, below + [n for n in found if n > near][:1]))


def _by_first_name(values: Mapping[str, Any], kind: ConfigClass) -> dict[str, Any]:
    """Every field by the name that all families share, where it has one."""
    shared = {own: other for other, own in kind.other_names.items()}
    return {shared.get(key, key): value for key, value in values.items()}


def _said_as(key: str, config: Mapping[str, Any], kind: ConfigClass) -> str:
    own = kind.other_names.get(key, key)
    return own if own in config else key


def _installed() -> Path | None:
    spec = importlib.util.find_spec("transformers")
    return Path(spec.origin).parent if spec is not None and spec.origin is not None else None


@lru_cache(maxsize=1)
def _class_names() -> Mapping[str, str]:
    """Every `model_type` with the name of its class."""
    return _mapping("CONFIG_MAPPING_NAMES")


@lru_cache(maxsize=1)
def _special_modules() -> Mapping[str, str]:
    return _mapping("SPECIAL_MODEL_TYPE_TO_MODULE_NAME")


@lru_cache(maxsize=1)
def _causal_models() -> Mapping[str, str]:
    """Every `model_type` that AutoModelForCausalLM knows, with the name of its model's class."""
    return _mapping("MODEL_FOR_CAUSAL_LM_MAPPING_NAMES", _CAUSAL)


def _no_causal_model(model_type: str) -> str:
    """What is wrong with a type that no run file can train; else empty."""
    known = _causal_models()
    if not known or model_type in known:
        return ""
    return f"{model_type!r} is no causal language model in transformers, and a run file trains one"


def _mapping(name: str, files: tuple[str, ...] = _MAPPING) -> dict[str, str]:
    """A table that transformers builds of pairs, and adds to with `update`."""
    folder = _installed()
    found: dict[str, str] = {}
    for file in files if folder else ():
        for node in _parsed(folder / file).body:  # type: ignore[operator]
            is_made = isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name
            is_added = isinstance(node, ast.Expr) and ast.unparse(node).startswith(f"{name}.update")
            if is_made or is_added:
                found |= dict(_pairs(node))
    return found


def _pairs(node: ast.AST) -> Iterator[tuple[str, str]]:
    for part in ast.walk(node):
        if isinstance(part, ast.Tuple) and len(part.elts) == 2:
            pairs = [tuple(part.elts)]
        elif isinstance(part, ast.Dict):
            pairs = list(zip(part.keys, part.values, strict=True))  # type: ignore[arg-type]
        else:
            continue
        for key, value in pairs:
            if isinstance(key, ast.Constant) and isinstance(value, ast.Constant):
                yield str(key.value), str(value.value)


@lru_cache(maxsize=8)
def _parsed(file: Path) -> ast.Module:
    try:
        return ast.parse(file.read_text(encoding="utf-8"))
    except (OSError, SyntaxError, UnicodeDecodeError):
        return ast.Module(body=[], type_ignores=[])


@lru_cache(maxsize=1)
def _base_fields() -> Mapping[str, str]:
    folder = _installed()
    body = _parsed(folder / "configuration_utils.py").body if folder else []
    classes = [n for n in body if isinstance(n, ast.ClassDef) and n.name in _BASES]
    return {name: text for node in classes for name, text, _ in _fields(node)}


def _read_class(file: Path, name: str) -> ConfigClass | None:
    """The class with what it inherits from classes of the same file; None where it inherits from
    one of another model."""
    classes = {node.name: node for node in _parsed(file).body if isinstance(node, ast.ClassDef)}
    node = classes.get(name)
    if node is None:
        return None
    annotations: dict[str, str] = {}
    defaults: dict[str, Any] = {}
    names: dict[str, str] = {}
    divides = False
    for each in _lineage(node, classes):
        if each is None:
            return None
        for key, annotation, value in _fields(each):
            annotations[key] = annotation
            defaults |= dict(_literal(key, value))
        names |= _other_names(each)
        divides = divides or "self.hidden_size % self.num_attention_heads" in ast.unparse(each)
    return ConfigClass(
        annotations=annotations, defaults=defaults, other_names=names, divides_hidden=divides
    )


def _lineage(
    node: ast.ClassDef, classes: Mapping[str, ast.ClassDef]
) -> Iterator[ast.ClassDef | None]:
    """From the eldest on; None for one that stands elsewhere."""
    for base in (ast.unparse(base) for base in node.bases):
        if base in classes:
            yield from _lineage(classes[base], classes)
        elif base not in _BASES:
            yield None
    yield node


def _fields(node: ast.ClassDef) -> Iterator[tuple[str, str, ast.expr | None]]:
    for field in node.body:
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
            annotation = ast.unparse(field.annotation)
            if not annotation.startswith("ClassVar"):
                yield field.target.id, annotation, field.value


def _other_names(node: ast.ClassDef) -> dict[str, str]:
    for field in node.body:
        targets = field.targets if isinstance(field, ast.Assign) else []
        if any(ast.unparse(target) == "attribute_map" for target in targets):
            return dict(_pairs(field))
    return {}


def _literal(key: str, node: ast.expr | None) -> Iterator[tuple[str, Any]]:
    """A literal, a product of literals (`4096 * 32`), or the default of a call; else nothing."""
    if isinstance(node, ast.Call):
        said = {keyword.arg: keyword.value for keyword in node.keywords}
        node = said.get("default")
    try:
        yield key, _value(node)
    except ValueError:
        return


def _value(node: ast.expr | None) -> Any:
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
        return _value(node.left) * _value(node.right)
    if node is None:
        raise ValueError("no value")
    return ast.literal_eval(node)
