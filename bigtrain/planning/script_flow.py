"""The statements that run when a script does, in the order in which they run.

Bodies of functions are looked into where they are called by name, and modules beside the script
where they are imported: as far as the source tells, without running it.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from bigtrain.errors import ConfigError

_DEEPEST = 20
_DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def parse(path: Path) -> ast.Module:
    """The source at `path`. ConfigError where it is not Python."""
    try:
        return ast.parse(path.read_bytes(), filename=str(path))
    except SyntaxError as error:
        place = f"{path}:{error.lineno}" if error.lineno else f"{path}"
        raise ConfigError(f"{place}: not Python: {error.msg}") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not Python: {error}") from None
    except OSError as error:
        raise ConfigError(f"{path}: can't be read: {error.strerror}") from None


def own_nodes(statement: ast.stmt) -> Iterator[ast.AST]:
    """The nodes that run with this statement itself: not those of statements inside it."""
    if isinstance(statement, (*_DEFINITIONS, ast.ClassDef)):
        return
    yield statement
    for child in ast.iter_child_nodes(statement):
        if isinstance(child, (ast.expr, ast.withitem)):
            yield from (node for node in ast.walk(child) if isinstance(node, ast.expr))


class Flow:
    """One walk through a script. Each function and each module is looked into once."""

    def __init__(self, script: Path) -> None:
        self._script = script
        self._functions: dict[str, tuple[Path, ast.FunctionDef | ast.AsyncFunctionDef]] = {}
        self._seen: set[object] = {script}

    def statements(self, module: ast.Module) -> Iterator[tuple[Path, ast.stmt]]:
        """Every statement with the file that it stands in."""
        yield from self._run(module.body, self._script, depth=0)

    def _run(
        self, body: list[ast.stmt], path: Path, *, depth: int
    ) -> Iterator[tuple[Path, ast.stmt]]:
        if depth > _DEEPEST:
            return
        for statement in body:
            if isinstance(statement, _DEFINITIONS):
                self._functions[statement.name] = (path, statement)
                continue
            yield from self._called(statement, depth=depth)
            yield path, statement
            if isinstance(statement, (ast.Import, ast.ImportFrom)):
                yield from self._imported(statement, depth=depth)
            for block in _blocks(statement):
                yield from self._run(block, path, depth=depth)

    def _called(self, statement: ast.stmt, *, depth: int) -> Iterator[tuple[Path, ast.stmt]]:
        for node in own_nodes(statement):
            if isinstance(node, ast.Call):
                place, function = self._functions.get(ast.unparse(node.func), (None, None))
                if place is not None and function is not None and function not in self._seen:
                    self._seen.add(function)
                    yield from self._run(function.body, place, depth=depth + 1)

    def _imported(
        self, statement: ast.Import | ast.ImportFrom, *, depth: int
    ) -> Iterator[tuple[Path, ast.stmt]]:
        for prefix, local in _local_modules(statement, self._script.parent):
            try:
                module = parse(local)
            except ConfigError:
                continue  # the import itself will say so, in the rank
            if local not in self._seen:
                self._seen.add(local)
                yield from self._run(module.body, local, depth=depth + 1)
            for inner in module.body:
                if isinstance(inner, _DEFINITIONS):
                    name = f"{prefix}.{inner.name}" if prefix else _alias(statement, inner.name)
                    self._functions[name] = (local, inner)


def _blocks(statement: ast.stmt) -> Iterator[list[ast.stmt]]:
    """The bodies inside a statement that run where it does; of a class too."""
    for name in ("body", "orelse", "finalbody"):
        yield getattr(statement, name, [])
    for name in ("handlers", "cases"):
        for part in getattr(statement, name, []):
            yield part.body


def _alias(statement: ast.Import | ast.ImportFrom, name: str) -> str:
    found = (alias.asname for alias in statement.names if alias.name == name)
    return next(found, None) or name


def _local_modules(
    statement: ast.Import | ast.ImportFrom, folder: Path
) -> Iterator[tuple[str, Path]]:
    """Modules beside the script that this imports, and the name before what they define."""
    if isinstance(statement, ast.Import):
        names = [(alias.name, alias.asname or alias.name) for alias in statement.names]
    else:
        names = [(statement.module or "", "")] if statement.level == 0 else []
    for name, prefix in names:
        parts = name.split(".")
        module, package = folder.joinpath(*parts).with_suffix(".py"), folder / parts[0]
        for place in (module, package / "__init__.py"):
            if all(parts) and place.is_file():
                yield prefix, place
