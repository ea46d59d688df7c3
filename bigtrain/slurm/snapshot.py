"""A copy of the code as it is when a job is submitted, which the job then runs.

What git tracks is copied, and new files that it does not ignore. What it ignores (data, models,
environments) is linked: a run finds it where it was. What runs have written is left out.
"""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

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
        """The plan that runs the copy."""
        source, directory = self._moved(plan.source), self._moved(plan.working_dir)
        return dataclasses.replace(plan, source=source, working_dir=directory)

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
        inside = leads.is_absolute() and leads.is_relative_to(self.root)
        return self.target / leads.relative_to(self.root) if inside else leads

    def _moved(self, path: str) -> str:
        resolved, root = Path(path).resolve(), self.root.resolve()
        inside = resolved.is_relative_to(root)
        return str(self.target / resolved.relative_to(root)) if inside else path


def _listed(root: Path, *which: str) -> Sequence[str]:
    text = git(root, "ls-files", "-z", *which, "--exclude-standard") or ""
    return [name for name in text.split("\0") if name]
