"""What a user's script does before and while it imports, read from its source without running it.

Ranks are forked from a server that has imported the script's libraries already. That changes
nothing as long as the script only imports them. Where it first does something that an import would
see (an environment variable, a search path, a module of its own under a library's name), every
rank needs an interpreter of its own.
"""

from __future__ import annotations

import ast
import importlib.util
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from bigtrain.planning.script_flow import Flow, own_nodes, parse

# Libraries whose import starts nothing that a fork would break: no CUDA, no threads that matter.
_PRELOADABLE = frozenset(
    {
        "accelerate",
        "bigtrain",
        "datasets",
        "deepspeed",
        "evaluate",
        "huggingface_hub",
        "numpy",
        "peft",
        "safetensors",
        "tokenizers",
        "torch",
        "transformers",
        "trl",
    }
)
# Names that these packages import only when they are asked for, with where they really are.
_LAZY_NAMES = {
    ("transformers", "Trainer"): "transformers.trainer",
    ("transformers", "TrainingArguments"): "transformers.training_args",
    ("transformers", "AutoConfig"): "transformers.models.auto.configuration_auto",
    ("transformers", "AutoModelForCausalLM"): "transformers.models.auto.modeling_auto",
    ("transformers", "AutoTokenizer"): "transformers.models.auto.tokenization_auto",
    ("bigtrain", "Trainer"): "bigtrain.trainer",
    ("bigtrain", "TrainingArguments"): "bigtrain.trainer",
}


@dataclass(frozen=True, kw_only=True)
class ScriptFacts:
    """What planning needs to know of a script."""

    preload: tuple[str, ...]
    """Modules that its top imports and that one process may import for all ranks."""
    fresh_reason: str = ""
    """Why forking would change what it does; empty where it would not."""
    uses_bigtrain: bool = False
    """True where it imports bigtrain, whose Trainer reads the plan itself."""


def read_script(path: Path) -> ScriptFacts:
    """The facts about the script at `path`. ConfigError where it is not Python."""
    module = parse(path)
    own = _imports_bigtrain(module)
    preload: dict[str, None] = {}
    reason = _shadowing(path.parent)
    for place, statement in Flow(path).statements(module):
        reason = reason or _disturbance(statement, place)
        if isinstance(statement, (ast.Import, ast.ImportFrom)):
            wanted = list(_preloadable(statement))
            if reason and wanted:
                return ScriptFacts(preload=(), fresh_reason=reason, uses_bigtrain=own)
            preload.update(dict.fromkeys(wanted))
    # What disturbs nothing that is preloaded (nothing at all, or only after the last import).
    return ScriptFacts(preload=tuple(preload), uses_bigtrain=own)


def _imports_bigtrain(module: ast.Module) -> bool:
    """Anywhere in the script, functions too."""
    for node in ast.walk(module):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [node.module or ""]
        else:
            continue
        if any(name.partition(".")[0] == "bigtrain" for name in names):
            return True
    return False


def _preloadable(statement: ast.Import | ast.ImportFrom) -> Iterator[str]:
    if isinstance(statement, ast.Import):
        names = [alias.name for alias in statement.names]
    elif statement.level == 0 and statement.module:
        names = [statement.module]
        names += [
            _LAZY_NAMES[statement.module, alias.name]
            for alias in statement.names
            if (statement.module, alias.name) in _LAZY_NAMES
        ]
    else:
        names = []
    for name in names:
        root = name.partition(".")[0]
        if root in _PRELOADABLE and importlib.util.find_spec(root) is not None:
            yield name


def _disturbance(statement: ast.stmt, path: Path) -> str:
    """What this one statement changes that a later import could see; empty if nothing."""
    for node in own_nodes(statement):
        what = _change(node)
        if what:
            return f"{path.name}:{statement.lineno} {what} before its imports"
    return ""


_ENVIRONMENT = ("os.environ", "environ")
_SEARCH_PATH = ("sys.path", "sys.modules", "sys.meta_path")
_CHANGING_METHODS = frozenset(
    {"append", "clear", "extend", "insert", "pop", "remove", "setdefault", "update"}
)
_CHANGING_CALLS = {
    "os.putenv": "sets an environment variable",
    "os.unsetenv": "unsets an environment variable",
    "load_dotenv": "sets environment variables",
    "dotenv.load_dotenv": "sets environment variables",
    "site.addsitedir": "changes where modules are found",
}


def _change(node: ast.AST) -> str:
    if isinstance(node, ast.Call):
        name = ast.unparse(node.func)
        owner, _, method = name.rpartition(".")
        if method in _CHANGING_METHODS:
            return _changed(owner)
        return _CHANGING_CALLS.get(name, "")
    targets: list[ast.expr] = []
    if isinstance(node, (ast.Assign, ast.Delete)):
        targets = node.targets
    elif isinstance(node, (ast.AugAssign, ast.AnnAssign)):
        targets = [node.target]
    for target in targets:
        base = target.value if isinstance(target, ast.Subscript) else target
        if changed := _changed(ast.unparse(base)):
            return changed
    return ""


def _changed(owner: str) -> str:
    if owner in _ENVIRONMENT:
        return "sets an environment variable"
    return "changes where modules are found" if owner in _SEARCH_PATH else ""


def _shadowing(folder: Path) -> str:
    """A module beside the script that hides an installed one from everything it imports."""
    names = {entry.stem for entry in folder.glob("*.py")}
    names |= {entry.parent.name for entry in folder.glob("*/__init__.py")}
    hiding = sorted(names & (_PRELOADABLE | frozenset(sys.stdlib_module_names)))
    return f"{hiding[0]} beside the script hides the installed module" if hiding else ""
