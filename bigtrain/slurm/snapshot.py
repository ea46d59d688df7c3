"""A copy of the code as it is when a job is submitted, which the job then runs.

What git tracks is copied, and new files that it does not ignore. What it ignores (data, models,
environments) is linked: a run finds it where it was. What runs have written is left out. A run's
relative paths to what is not in the copy become absolute.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from bigtrain.errors import ConfigError
from bigtrain.plan import RunPlan
from bigtrain.slurm.provenance import CodeState, git, without_runs


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """A copy of a work tree, made or to be made."""

    root: Path
    """Of the work tree."""
    target: Path
    outputs: tuple[str, ...] = ()
    """Where the job's runs write, below the root."""

    @classmethod
    def of(cls, plan: RunPlan, code: CodeState | None) -> Snapshot:
        """The one of a job whose first run is `plan`. ConfigError outside a work tree."""
        if code is None:
            raise ConfigError(
                f"--snapshot copies what git knows of, and {plan.working_dir} is in no git work "
                "tree with a commit; commit the code, or leave --snapshot out"
            )
        target = Path(plan.output_dir) / "code" / f"attempt-{plan.attempt:02d}"
        return cls(root=Path(code.root), target=target, outputs=code.outputs)

    def moved(self, plan: RunPlan) -> RunPlan:
        """The plan that runs the copy. ConfigError where an argument of its script would lead
        elsewhere from there: only the script knows what it means."""
        cwd = Path(plan.working_dir).resolve()
        astray = [word for word in plan.script_args if self._leads_out(_value_of(word), cwd)]
        if astray:
            raise ConfigError(
                [
                    f"{word}: it leads out of {self.root}, of which --snapshot runs a copy; give "
                    "the script an absolute path, or leave --snapshot out"
                    for word in astray
                ]
            )
        return dataclasses.replace(
            plan,
            source=self._moved(plan.source),
            working_dir=self._moved(plan.working_dir),
            training=_absolute(plan.training, cwd, where=self._leads_out),
            **{
                name: _absolute(getattr(plan, name), cwd, where=self._is_left_out)
                for name in ("model", "tokenizer", "data")
            },
        )

    def take(self) -> int:
        """Make the copy, in place of what may lie there; its bytes. OSError as it comes."""
        shutil.rmtree(self.target, ignore_errors=True)
        size = 0
        for name in self._names(self.root):
            source, copy = self.root / name, self.target / name
            copy.parent.mkdir(parents=True, exist_ok=True)
            if source.is_symlink():
                copy.symlink_to(self._moved_link(source))
            else:
                shutil.copy2(source, copy)
                size += copy.stat().st_size
        self._link_ignored()
        return size

    def _names(self, root: Path) -> Iterator[str]:
        """Files below `root`, by their path from there; those of inner repositories too."""
        tracked = _listed(root, "--cached")
        outputs = self.outputs if root == self.root else ()
        new = without_runs(_listed(root, "--others"), outputs=outputs)
        for name in dict.fromkeys([*tracked, *new]):
            path = root / name
            if path.is_symlink() or path.is_file():
                yield name
            elif path.is_dir():  # a submodule, or a repository that git takes for one new thing
                inner = self._names(path) if (path / ".git").exists() else ()
                yield from (f"{name.rstrip('/')}/{inside}" for inside in inner)

    def _link_ignored(self) -> None:
        for name in _listed(self.root, "--others", "--ignored", "--directory"):
            copy = self.target / name.rstrip("/")
            if PurePosixPath(name).name == "__pycache__" or copy.exists():
                continue
            copy.parent.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(FileExistsError):
                copy.symlink_to(self.root / name.rstrip("/"))

    def _moved_link(self, source: Path) -> Path:
        """Where it leads, or the same place in the copy."""
        leads = source.readlink()
        if not leads.is_absolute():
            return _from(source.parent, leads) if self._leads_out(leads, source.parent) else leads
        inside = leads.is_relative_to(self.root)
        return self.target / leads.relative_to(self.root) if inside else leads

    def _leads_out(self, path: str | Path, cwd: Path) -> bool:
        """Whether a relative path leads from `cwd` out of the work tree."""
        is_outside = not _from(cwd, path).is_relative_to(self.root.resolve())
        return is_outside and not Path(path).is_absolute()

    def _is_left_out(self, path: str | Path, cwd: Path) -> bool:
        """The same, or to what a run has written in the work tree, which the copy has not."""
        if self._leads_out(path, cwd):
            return True
        if Path(path).is_absolute():
            return False
        inside = _from(cwd, path).relative_to(self.root.resolve())
        folders = [self.root / up for up in (inside, *inside.parents) if up.name]
        return any(_has_attempts(folder) for folder in folders)

    def _moved(self, path: str) -> str:
        resolved, root = Path(path).resolve(), self.root.resolve()
        inside = resolved.is_relative_to(root)
        return str(self.target / resolved.relative_to(root)) if inside else path


def _from(directory: Path, path: str | Path) -> Path:
    return Path(os.path.normpath(directory / path))


def _absolute(value: Any, cwd: Path, *, where: Callable[[str, Path], bool]) -> Any:
    """A section of a plan, its relative paths made absolute `where` that is due."""
    if isinstance(value, Mapping):
        return {key: _absolute(inner, cwd, where=where) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_absolute(inner, cwd, where=where) for inner in value)
    return str(_from(cwd, value)) if isinstance(value, str) and where(value, cwd) else value


def _has_attempts(folder: Path) -> bool:
    with contextlib.suppress(OSError, ValueError):  # not every text of a plan can be a path
        return any(folder.glob("plans/attempt-*.json"))
    return False


def _value_of(word: str) -> str:
    """Of `--option=value`, else the word itself."""
    return word.partition("=")[2] if word.startswith("-") and "=" in word else word


def _listed(root: Path, *which: str) -> Sequence[str]:
    text = git(root, "ls-files", "-z", *which, "--exclude-standard") or ""
    return [name for name in text.split("\0") if name]
