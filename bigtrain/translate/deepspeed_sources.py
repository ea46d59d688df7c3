"""What the installed DeepSpeed's sources say of its JSON: keys, types and bounds, read by `ast`."""

from __future__ import annotations

import ast
import importlib.util
import operator
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeAlias

Kinds: TypeAlias = frozenset[str]
"""Names of the types that a value may have; empty: not checked."""
Keys: TypeAlias = Mapping[str, Kinds]
AUTO = "auto"

# Section → the pydantic class that its keys are fields of. What these name is found by itself.
_CLASSES: Mapping[str, str] = {
    "zero_optimization": "DeepSpeedZeroConfig",
    "bf16": "DeepSpeedBF16Config",
    "fp16": "DeepSpeedFP16Config",
    "tensorboard": "TensorBoardConfig",
    "wandb": "WandbConfig",
    "csv_monitor": "CSVConfig",
    "comet": "CometConfig",
    "comms_logger": "CommsLoggerConfig",
    "compile": "CompileConfig",
    "timers.throughput": "DeepSpeedThroughputTimerConfig",
    "hybrid_engine": "HybridEngineConfig",
}
_CLASS_FILES = (
    "runtime/config.py",
    "runtime/zero/*config.py",
    "runtime/precision_config.py",
    "runtime/zenflow/zenflow_config.py",
    "monitor/config.py",
    "comm/config.py",
    "compile/config.py",
    "utils/config.py",
)
_DATA = "runtime/data_pipeline/constants.py"
# Section → the file whose constants of that name, or of that prefix where it ends in _, are its
# keys.
_CONSTANTS: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "activation_checkpointing": ("runtime/activation_checkpointing/config.py", ("ACT_CHKPT_",)),
    "aio": ("runtime/swap_tensor/constants.py", ("AIO_",)),
    "autotuning": ("autotuning/constants.py", ("AUTOTUNING_", "MODEL_INFO")),
    "checkpoint": (
        "runtime/constants.py",
        ("CHECKPOINT_TAG_", "CHECKPOINT_PARALLEL_", "LOAD_UNIVERSAL_", "USE_NODE_LOCAL_"),
    ),
    "data_efficiency": (_DATA, ("DATA_EFFICIENCY_", "DATA_SAMPLING", "DATA_ROUTING")),
    "data_efficiency.data_sampling": (
        _DATA,
        ("DATA_SAMPLING_", "CURRICULUM_LEARNING", "DYNAMIC_BATCHING"),
    ),
    "data_efficiency.data_routing": (_DATA, ("DATA_ROUTING_", "RANDOM_LTD")),
    "data_types": (
        "runtime/constants.py",
        ("GRAD_ACCUM_", "PARAM_DTYPE", "BUFFER_DTYPE", "KEEP_IN_FP32_"),
    ),
    "flops_profiler": ("profiling/constants.py", ("FLOPS_PROFILER_",)),
    "torch_autocast": ("runtime/constants.py", ("TORCH_AUTOCAST_",)),
}
_TOP_FILES = (
    "runtime/config.py",
    "runtime/*config.py",
    "runtime/*/*config.py",
    *("comm/config.py", "profiling/config.py", "utils/config.py", "autotuning/config.py"),
    "datastates/config.py",
)
# Read at the top in a way that `_top_level` does not see.
_ALSO_AT_THE_TOP = (
    *("communication_data_type", "seq_parallel_communication_data_type"),
    *("tensorboard", "wandb", "csv_monitor", "comet"),
    *("sequence_parallel_size", "vocabulary_size"),
)
# Looked up by functions that call a section as the others call the whole.
_LOOKED_UP_IN_SECTIONS = frozenset(
    {
        *("curriculum_learning", "data_routing", "data_sampling", "dynamic_batching"),
        *("model_info", "random_ltd", "writer"),
    }
)
_REMOVED: Mapping[str, str] = {
    "_REMOVED_TOP_LEVEL_CONFIG_KEYS": "",
    "_REMOVED_ZERO_CONFIG_KEYS": "zero_optimization.",
}
"""Names in runtime/config.py of what it refuses by name, and the section of its keys."""
_BOUNDS: Mapping[str, tuple[str, Callable[[Any, Any], bool]]] = {
    "ge": ("at least", operator.ge),
    "gt": ("more than", operator.gt),
    "le": ("at most", operator.le),
    "lt": ("less than", operator.lt),
}
"""pydantic's words."""
# What DeepSpeed checks in functions of its own.
_CHECKED_BY_CALL: Mapping[str, tuple[tuple[str, float], ...]] = {
    "fp16.loss_scale": (("ge", 0),),
    "fp16.loss_scale_window": (("gt", 0),),
    "fp16.min_loss_scale": (("gt", 0),),
    "gradient_predivide_factor": (("gt", 0),),
}
_HOLDS_THE_JSON = ("param_dict", "ds_config", "config_dict")
_PYDANTIC_KINDS = {"int", "float", "bool", "str", "list", "dict"}
KIND_WORDS = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "str": "text",
    "list": "a list",
    "dict": "a section",
}


def dotted(section: str, key: str) -> str:
    """The key with its section before it; of the top, alone."""
    return f"{section}.{key}" if section else key


def _kind_of(value: Any) -> Kinds:
    """That of a default; "auto" and None tell nothing."""
    kind = type(value).__name__
    return frozenset({kind}) if kind in KIND_WORDS and value != AUTO else frozenset()


@lru_cache(maxsize=1)
def known_keys() -> Mapping[str, Keys]:
    """Section → its keys. Empty, and nothing is refused, where DeepSpeed is not installed."""
    folder = _folder()
    if folder is None:
        return {}
    found: dict[str, dict[str, Kinds]] = {section: {} for section in _CLASSES}
    for field in _class_fields(folder):
        found.setdefault(field.section, {}).update(dict.fromkeys(field.names, field.kinds))
    for section, (file, names) in _CONSTANTS.items():
        found[section] = _of_constants(folder / file, names)
    return {**found, "": _top_level(folder)}


@lru_cache(maxsize=1)
def bounds_of_numbers() -> Mapping[str, tuple[tuple[str, Callable[[Any, Any], bool], float], ...]]:
    """Dotted key → what its number must be: the word for it, the comparison, and with what."""
    folder = _folder()
    declared = {
        dotted(field.section, name): field.bounds
        for field in (_class_fields(folder) if folder else ())
        for name in field.names
    }
    return {
        path: tuple((*_BOUNDS[word], bound) for word, bound in bounds)
        for path, bounds in {**declared, **_CHECKED_BY_CALL}.items()
    }


@lru_cache(maxsize=1)
def removed_keys() -> frozenset[str]:
    """Dotted keys that DeepSpeed once had, and refuses now."""
    folder = _folder()
    statements = _parsed(folder / "runtime/config.py").body if folder else ()
    return frozenset(
        f"{_REMOVED[node.targets[0].id]}{key.value!s}"
        for node in statements
        if isinstance(node, ast.Assign)
        and isinstance(node.targets[0], ast.Name)
        and node.targets[0].id in _REMOVED
        and isinstance(node.value, ast.Dict)
        for key in node.value.keys
        if isinstance(key, ast.Constant)
    )


def _folder() -> Path | None:
    spec = importlib.util.find_spec("deepspeed")
    return None if spec is None or spec.origin is None else Path(spec.origin).parent


@dataclass(frozen=True, kw_only=True)
class _Field:
    """One field of a pydantic class."""

    section: str
    names: tuple[str, ...]
    """Its own name and its aliases."""
    kinds: Kinds
    bounds: tuple[tuple[str, float], ...]


def _class_fields(folder: Path) -> Iterator[_Field]:
    models = {
        node.name: node
        for pattern in _CLASS_FILES
        for node in _parsed_all(folder, pattern)
        if isinstance(node, ast.ClassDef)
    }
    for section, model in _CLASSES.items():
        yield from _of_class(section, model, models)


def _parsed_all(folder: Path, pattern: str) -> Iterator[ast.stmt]:
    for file in sorted(folder.glob(pattern)):
        yield from _parsed(file).body


def _parsed(file: Path) -> ast.Module:
    try:
        return ast.parse(file.read_text(encoding="utf-8"))
    except (OSError, SyntaxError, UnicodeDecodeError):
        return ast.Module(body=[], type_ignores=[])


def _of_class(section: str, model: str, models: Mapping[str, ast.ClassDef]) -> Iterator[_Field]:
    """A pydantic class's fields; those of the classes of this kind that they name as well."""
    node = models.get(model)
    for field in node.body if node else ():
        if not (isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)):
            continue
        words = {part.id for part in ast.walk(field.annotation) if isinstance(part, ast.Name)}
        said = dict(_keywords(field.value))
        names = (field.target.id, *(str(said[word]) for word in ("alias",) if word in said))
        bounds = (
            (word, said[word]) for word in _BOUNDS if isinstance(said.get(word), (int, float))
        )
        yield _Field(section=section, names=names, kinds=_kinds(words), bounds=tuple(bounds))
        for inner in sorted(words & models.keys()):
            for name in names:
                yield from _of_class(f"{section}.{name}", inner, models)


def _kinds(words: set[str]) -> Kinds:
    """Those of an annotation; empty where it names a class that is not plain."""
    plain = {word.lower() for word in words} - {"optional", "union", "any"}
    return frozenset(plain) if plain <= _PYDANTIC_KINDS and "Any" not in words else frozenset()


def _keywords(value: ast.expr | None) -> Iterator[tuple[str, Any]]:
    """What a `Field(…)` says by name."""
    for keyword in value.keywords if isinstance(value, ast.Call) else ():
        if keyword.arg and isinstance(keyword.value, ast.Constant):
            yield keyword.arg, keyword.value.value


def _of_constants(file: Path, prefixes: tuple[str, ...]) -> dict[str, Kinds]:
    """`X = "key"` with the type of `X_DEFAULT`."""
    values = dict(_assigned(_parsed(file)))
    return {
        value: _kind_of(values.get(f"{name}_DEFAULT"))
        for name, value in values.items()
        if isinstance(value, str) and _is_key(name) and _is_named(name, prefixes)
    }


def _is_named(name: str, patterns: tuple[str, ...]) -> bool:
    return any(name == p or (p.endswith("_") and name.startswith(p)) for p in patterns)


def _assigned(module: ast.Module) -> Iterator[tuple[str, Any]]:
    for node in module.body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            try:
                yield node.targets[0].id, ast.literal_eval(node.value)
            except (ValueError, TypeError):
                continue


def _is_key(name: str) -> bool:
    return not name.endswith(("_DEFAULT", "_FORMAT", "_MODES"))


def _top_level(folder: Path) -> dict[str, Kinds]:
    """The names that DeepSpeed looks up in the JSON, with the types of their defaults."""
    constants: dict[str, Any] = {}
    for file in ("runtime/constants.py", *_TOP_FILES, "*/constants.py", "runtime/*/constants.py"):
        for path in folder.glob(file):
            constants |= dict(_assigned(_parsed(path)))
    kinds = {
        value: _kind_of(constants.get(f"{name}_DEFAULT"))
        for name, value in constants.items()
        if isinstance(value, str) and _is_key(name)
    }
    looked_up = {
        str(constants.get(node.id) if isinstance(node, ast.Name) else ast.literal_eval(node))
        for pattern in _TOP_FILES
        for path in folder.glob(pattern)
        for node in _look_ups(_parsed(path))
    }
    names = (looked_up - {"None"} - _LOOKED_UP_IN_SECTIONS) | set(_ALSO_AT_THE_TOP)
    return {name: kinds.get(name, frozenset()) for name in sorted(names)}


def _look_ups(module: ast.Module) -> Iterator[ast.Name | ast.Constant]:
    """What is asked for as `d[key]`, `d.get(key)`, `key in d` or `get_scalar_param(d, key, …)`,
    where d holds the JSON."""
    for node in ast.walk(module):
        key: ast.expr | None = None
        if isinstance(node, ast.Subscript) and _holds(node.value):
            key = node.slice
        elif isinstance(node, ast.Compare) and _holds(node.comparators[0]):
            key = node.left
        elif isinstance(node, ast.Call) and len(node.args) > 1 and _holds(node.args[0]):
            key = node.args[1]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.args:
            key = node.args[0] if node.func.attr == "get" and _holds(node.func.value) else None
        if isinstance(key, (ast.Name, ast.Constant)):
            yield key


def _holds(node: ast.expr) -> bool:
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        return node.func.attr == "keys" and _holds(node.func.value)
    return isinstance(node, ast.Name) and node.id in _HOLDS_THE_JSON
