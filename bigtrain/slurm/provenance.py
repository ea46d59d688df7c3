"""The code of a run as it was when the run was submitted, and what became of it since."""

from __future__ import annotations

import dataclasses
import hashlib
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bigtrain.errors import ConfigError
from bigtrain.plan import RunPlan

_MOST_HASHED_BYTES = 16 << 20
"""A larger file is told apart by its size and time: data that lies beside the code."""
_MOST_NAMED = 5


@dataclass(frozen=True, kw_only=True)
class CodeState:
    """A git work tree at one moment."""

    root: str
    commit: str
    changed: Mapping[str, str] = field(default_factory=dict)
    """Files that differ from the commit, untracked ones too → hash; empty text: deleted."""

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> CodeState:
        return cls(**content)


def read_code_state(directory: Path) -> CodeState | None:
    """The state of the work tree around `directory`; None where there is none, or no commit."""
    root = _git(directory, "rev-parse", "--show-toplevel")
    commit = _git(directory, "rev-parse", "--verify", "--quiet", "HEAD")
    if root is None or commit is None:
        return None
    top = Path(root.strip())
    status = _git(top, "status", "--porcelain", "-z", "--untracked-files=all", "--no-renames") or ""
    names = sorted(entry[3:] for entry in status.split("\0") if entry)
    return CodeState(
        root=str(top), commit=commit.strip(), changed={n: _fingerprint(top / n) for n in names}
    )


def read_diff(state: CodeState) -> str:
    """What the work tree's tracked files have that the commit has not."""
    return _git(Path(state.root), "diff", "HEAD") or ""


def hash_file(path: Path) -> str:
    """sha256 of a file's bytes, as hexadecimal text."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def changes(then: CodeState) -> list[str]:
    """What has changed in the work tree since, in words; empty where nothing has."""
    now = read_code_state(Path(then.root))
    if now is None:
        return [f"{then.root} is no git work tree any more"]
    lines = []
    edited = {name for name in {*then.changed, *now.changed} if _differs(name, then, now)}
    if now.commit != then.commit:
        lines.append(f"{then.root} is at commit {now.commit[:12]}, and was at {then.commit[:12]}")
        between = _git(Path(now.root), "diff", "--name-only", "-z", then.commit, now.commit) or ""
        edited |= {name for name in between.split("\0") if name}
    if edited:
        names = sorted(edited)
        more = f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
        lines.append(f"edited in {then.root}: {', '.join(names[:_MOST_NAMED])}{more}")
    return lines


def take_snapshot(plan: RunPlan, target: Path) -> tuple[RunPlan, CodeState]:
    """Copy the work tree around the run's directory to `target`; the plan that runs the copy.

    Tracked files and untracked ones that git does not ignore. ConfigError outside a work tree.
    """
    state = read_code_state(Path(plan.working_dir))
    if state is None:
        raise ConfigError(
            f"--snapshot copies what git knows of, and {plan.working_dir} is in no git work tree "
            "with a commit; commit the code, or leave --snapshot out"
        )
    root = Path(state.root)
    listed = _git(root, "ls-files", "-z", "--cached", "--others", "--exclude-standard") or ""
    for name in {name for name in listed.split("\0") if name}:
        source, copy = root / name, target / name
        if source.is_file() or source.is_symlink():
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, copy, follow_symlinks=False)
    moved = dataclasses.replace(
        plan,
        source=_moved(plan.source, root, target),
        working_dir=_moved(plan.working_dir, root, target),
    )
    return moved, state


def _moved(path: str, root: Path, target: Path) -> str:
    resolved = Path(path).resolve()
    inside = resolved.is_relative_to(root.resolve())
    return str(target / resolved.relative_to(root.resolve())) if inside else path


def _differs(name: str, then: CodeState, now: CodeState) -> bool:
    if name in then.changed and name in now.changed:
        return then.changed[name] != now.changed[name]
    return then.commit == now.commit  # else the commits' own difference tells


def _fingerprint(path: Path) -> str:
    try:
        status = path.lstat()
        if path.is_symlink():
            return f"link {path.readlink()}"
        if not path.is_file():
            return "not a file"
        if status.st_size > _MOST_HASHED_BYTES:
            return f"{status.st_size} bytes at {status.st_mtime_ns}"
        return hash_file(path)
    except FileNotFoundError:
        return ""


def _git(directory: Path, *arguments: str) -> str | None:
    """What git printed; None where git is missing or refuses."""
    # Read only: without this, `git status` takes the index lock from under the user's own git.
    command = ["git", "--no-optional-locks", "-C", str(directory), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, check=False)
    except FileNotFoundError:
        return None
    return done.stdout.decode(errors="surrogateescape") if done.returncode == 0 else None
