"""The keys that the installed DeepSpeed has, read from its sources by `ast`.

DeepSpeed takes a misspelt key at the top and in some sections without a word.
"""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from bigtrain.arguments.values import did_you_mean

# Section → the file and the pydantic class that its keys are fields of.
_MODELS: Mapping[str, tuple[str, str]] = {
    "zero_optimization": ("zero/config.py", "DeepSpeedZeroConfig"),
    "zero_optimization.offload_param": (
        "zero/offload_config.py",
        "DeepSpeedZeroOffloadParamConfig",
    ),
    "zero_optimization.offload_optimizer": (
        "zero/offload_config.py",
        "DeepSpeedZeroOffloadOptimizerConfig",
    ),
    "bf16": ("precision_config.py", "DeepSpeedBF16Config"),
    "fp16": ("precision_config.py", "DeepSpeedFP16Config"),
}
# The others' keys are constants, in files of many names.
_CONSTANTS: Mapping[str, tuple[str, ...]] = {
    "": (
        "*constants.py",
        "*/constants.py",
        "config.py",
        "../profiling/constants.py",
        "../constants.py",
        "../monitor/constants.py",
        "../monitor/config.py",
        "precision_config.py",
        "activation_checkpointing/config.py",
    ),
    "activation_checkpointing": ("activation_checkpointing/config.py",),
    "aio": ("swap_tensor/constants.py",),
}


def unknown(given: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong, and the fix, for each key that DeepSpeed does not have."""
    yield from _unknown(given, "", _known())


def _unknown(
    section: Mapping[str, Any], name: str, known: Mapping[str, frozenset[str]]
) -> Iterator[str]:
    keys = known.get(name)
    for key, value in section.items():
        path = f"{name}.{key}" if name else key
        if keys and key not in keys:
            yield f"{path} is no key of DeepSpeed's{did_you_mean(key, keys)}"
        elif isinstance(value, Mapping):
            yield from _unknown(value, path, known)


@lru_cache(maxsize=1)
def _known() -> Mapping[str, frozenset[str]]:
    """Section → its keys. Empty, and nothing is refused, where DeepSpeed is not installed."""
    spec = importlib.util.find_spec("deepspeed")
    if spec is None or spec.origin is None:
        return {}
    folder = Path(spec.origin).parent / "runtime"
    found: dict[str, frozenset[str]] = {}
    for section, (file, model) in _MODELS.items():
        found[section] = frozenset(_model_fields(folder / file, model))
    for section, patterns in _CONSTANTS.items():
        files = (file for pattern in patterns for file in _matching(folder, pattern))
        found[section] = frozenset(word for file in files for word in _strings(file))
    return found


def _matching(folder: Path, pattern: str) -> Iterator[Path]:
    while pattern.startswith("../"):
        folder, pattern = folder.parent, pattern.removeprefix("../")
    yield from folder.glob(pattern)


def _parsed(file: Path) -> ast.Module:
    try:
        return ast.parse(file.read_text(encoding="utf-8"))
    except (OSError, SyntaxError, UnicodeDecodeError):
        return ast.Module(body=[], type_ignores=[])


def _strings(file: Path) -> Iterator[str]:
    for node in ast.walk(_parsed(file)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and len(node.value) < 60:
            yield node.value


def _model_fields(file: Path, name: str) -> Iterator[str]:
    """A pydantic class's fields and their aliases."""
    for node in _parsed(file).body:
        if not (isinstance(node, ast.ClassDef) and node.name == name):
            continue
        for field in node.body:
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
                yield field.target.id
                calls = field.value.keywords if isinstance(field.value, ast.Call) else []
                for keyword in calls:
                    if keyword.arg == "alias" and isinstance(keyword.value, ast.Constant):
                        yield str(keyword.value.value)
