"""What the installed transformers takes beyond the fields of TrainingArguments, read from its
sources without importing them: keywords of schedules, keys, names, and packages that it needs."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import lru_cache

from bigtrain.arguments.schema import (
    class_body,
    class_constants,
    enum_values,
    installed_transformers,
    parse,
)

_ATTENTIONS = re.compile(
    r"^class AttentionInterface\b.*?^    _global_mapping = \{(.*?)^    \}", re.MULTILINE | re.DOTALL
)
_GIVEN_BY_THE_LOOP = ("optimizer", "num_warmup_steps", "num_training_steps")
_OF_TORCH = ("torch", "packaging", "typing", "collections")


def debug_options() -> tuple[str, ...]:
    """The words of `debug`."""
    return enum_values(installed_transformers() / "debug_utils.py")["DebugOption"]


def accelerator_keys() -> tuple[str, ...]:
    """The keys of `accelerator_config`."""
    source = installed_transformers() / "trainer_pt_utils.py"
    body = class_body(parse(source), "AcceleratorConfig", source)
    fields = (node.target for node in body if isinstance(node, ast.AnnAssign))
    return tuple(target.id for target in fields if isinstance(target, ast.Name))


def attention_implementations() -> tuple[str, ...]:
    """The names that `attn_implementation` may have without code from elsewhere; empty where they
    can't be read."""
    text = (installed_transformers() / "modeling_utils.py").read_text(encoding="utf-8")
    table = _ATTENTIONS.search(text)
    return ("eager", *re.findall(r'^\s*"([^"]+)":', table[1], re.MULTILINE)) if table else ()


def schedule_keywords(kind: str) -> frozenset[str] | None:
    """What `lr_scheduler_kwargs` may hold for a schedule; None where anything may be there."""
    module = parse(installed_transformers() / "optimization.py")
    function = _functions(module).get(_table(module, "TYPE_TO_SCHEDULER_FUNCTION").get(kind, ""))
    if function is None or function.args.kwarg is not None:
        return None
    names = (argument.arg for argument in (*function.args.args, *function.args.kwonlyargs))
    return frozenset(names) - {*_GIVEN_BY_THE_LOOP}


@lru_cache(maxsize=1)
def optimizer_packages() -> dict[str, str]:
    """Optimizer → the package that it comes from, where that isn't torch or transformers."""
    module = parse(installed_transformers() / "trainer_optimizer.py")
    functions = _functions(module)
    found = {}
    for name, handler in _table(module, "_OPTIMIZER_HANDLERS").items():
        foreign = list(_foreign_imports(functions[handler])) if handler in functions else []
        if foreign:
            found[name] = foreign[0]
    return found


def _foreign_imports(function: ast.FunctionDef) -> Iterator[str]:
    for node in ast.walk(function):
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            package = node.module.partition(".")[0]
            if package not in _OF_TORCH:
                yield package


def _functions(module: ast.Module) -> dict[str, ast.FunctionDef]:
    return {node.name: node for node in module.body if isinstance(node, ast.FunctionDef)}


def _table(module: ast.Module, name: str) -> dict[str, str]:
    """A table of a module from an enum's members to functions: the members' values, and names."""
    values = {
        target.id: node.value
        for node in module.body
        if isinstance(node, (ast.Assign, ast.AnnAssign)) and node.value is not None
        for target in (node.targets if isinstance(node, ast.Assign) else (node.target,))
        if isinstance(target, ast.Name)
    }
    table = values.get(name)
    pairs = zip(table.keys, table.values, strict=True) if isinstance(table, ast.Dict) else ()
    found: dict[str, str] = {}
    for key, value in pairs:
        if key is not None:
            found[_member(key)] = ast.unparse(value)
        elif isinstance(value, ast.Call):  # **dict.fromkeys(LIST, function)
            members, function = value.args
            listed = values.get(ast.unparse(members))
            for member in listed.elts if isinstance(listed, ast.List) else ():
                found[_member(member)] = ast.unparse(function)
    return found


def _member(node: ast.expr) -> str:
    """`SchedulerType.LINEAR` as its value."""
    kind, _, name = ast.unparse(node).rpartition(".")
    return _enums().get(kind, {}).get(name, name)


@lru_cache(maxsize=1)
def _enums() -> dict[str, dict[str, str]]:
    folder = installed_transformers()
    return {
        node.name: {name: str(value) for name, value in class_constants(node.body)}
        for file in ("trainer_utils.py", "training_args.py")
        for node in parse(folder / file).body
        if isinstance(node, ast.ClassDef) and node.name in ("SchedulerType", "OptimizerNames")
    }
