"""The code of a run as it was when the run was submitted, and what became of it since."""

from __future__ import annotations

import hashlib
import re
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from bigtrain.errors import LaunchError

_MOST_HASHED_BYTES = 16 << 20
"""A larger file is told apart by its size and time: data that lies beside the code."""
_MOST_NAMED = 5
_RUN = re.compile(r"(.+)/plans/attempt-\d+\.json")
"""What tells the output directory of a run."""


@dataclass(frozen=True, kw_only=True)
class CodeState:
    """A git work tree at one moment."""

    root: str
    commit: str
    changed: Mapping[str, str] = field(default_factory=dict)
    """Files that differ from the commit, untracked ones too → hash; empty text: deleted. What runs
    have written is none of it."""
    outputs: tuple[str, ...] = ()
    """Where this job's runs write, below the root."""

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> CodeState:
        """TypeError or ValueError where `content` is not what was written."""
        texts = [content["root"], content["commit"], *content.get("outputs", ())]
        changed = dict(content["changed"])
        if not all(isinstance(text, str) for text in (*texts, *changed, *changed.values())):
            raise TypeError("the state of the code is not text")
        return cls(root=texts[0], commit=texts[1], outputs=tuple(texts[2:]), changed=changed)


def read_code_state(
    directory: Path, *, outputs: Sequence[Path] = (), patience_s: float | None = None
) -> CodeState | None:
    """The state of the work tree around `directory`; None where there is none, or no commit.

    `outputs`: where the job's runs write. LaunchError where git takes longer than `patience_s`.
    """
    root = git(directory, "rev-parse", "--show-toplevel", patience_s=patience_s)
    commit = git(directory, "rev-parse", "--verify", "--quiet", "HEAD", patience_s=patience_s)
    if root is None or commit is None:
        return None
    top = Path(root.removesuffix("\n"))
    inside = tuple(
        str(place.relative_to(top)) for place in outputs if place != top and top in place.parents
    )
    command = ("status", "--porcelain", "-z", "--untracked-files=all", "--no-renames")
    status = git(top, *command, patience_s=patience_s) or ""
    entries = [entry for entry in status.split("\0") if entry]
    tracked = [entry[3:] for entry in entries if entry[:2] != "??"]
    names = [*tracked, *without_runs([e[3:] for e in entries if e[:2] == "??"], outputs=inside)]
    changed = {name: _fingerprint(top / name) for name in sorted(names)}
    return CodeState(root=str(top), commit=commit.strip(), changed=changed, outputs=inside)


def without_runs(untracked: Sequence[str], *, outputs: Sequence[str]) -> list[str]:
    """The files that no run has written: neither one of this job's nor an earlier one."""
    runs = {match[1] for name in untracked if (match := _RUN.fullmatch(name))} | set(outputs)
    return [n for n in untracked if runs.isdisjoint(map(str, PurePosixPath(n).parents))]


def read_diff(state: CodeState) -> str:
    """What the work tree's tracked files have that the commit has not."""
    return git(Path(state.root), "diff", "HEAD") or ""


def hash_file(path: Path) -> str:
    """sha256 of a file's bytes, as hexadecimal text."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def changes(then: CodeState, *, patience_s: float | None = None) -> list[str]:
    """What has changed in the work tree since, in words; empty where nothing has.

    LaunchError where git takes longer than `patience_s` for a part of it.
    """
    root = Path(then.root)
    outputs = [root / name for name in then.outputs]
    now = read_code_state(root, outputs=outputs, patience_s=patience_s)
    if now is None:
        return [f"{then.root} is no git work tree any more"]
    lines = []
    edited = {name for name in {*then.changed, *now.changed} if _differs(name, then, now)}
    if now.commit != then.commit:
        lines.append(f"{then.root} is at commit {now.commit[:12]}, and was at {then.commit[:12]}")
        command = ("diff", "--name-only", "-z", then.commit, now.commit)
        between = git(root, *command, patience_s=patience_s) or ""
        edited |= {name for name in between.split("\0") if name}
    if edited:
        names = sorted(edited)
        more = f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
        lines.append(f"edited in {then.root}: {', '.join(names[:_MOST_NAMED])}{more}")
    return lines


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
    except OSError as error:
        return f"unreadable: {error.strerror}"


def git(directory: Path, *arguments: str, patience_s: float | None = None) -> str | None:
    """What git printed; None where git is missing or refuses. LaunchError where it is too slow."""
    # Read only: without this, `git status` takes the index lock from under the user's own git.
    command = ["git", "--no-optional-locks", "-C", str(directory), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, check=False, timeout=patience_s)
    except FileNotFoundError:
        return None
    except subprocess.TimeoutExpired:
        raise LaunchError(f"git {arguments[0]} has not answered for {patience_s} s") from None
    return done.stdout.decode(errors="surrogateescape") if done.returncode == 0 else None
