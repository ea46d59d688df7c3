"""Which checkpoint a run goes on from."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from bigtrain.checkpoint.manifest import MANIFEST, PARTS, Manifest, read_manifest
from bigtrain.checkpoint.staging import committed, committed_at, newest_first
from bigtrain.checkpoint.verify import verify_checkpoint
from bigtrain.errors import CheckpointError


@dataclass(frozen=True, kw_only=True)
class Found:
    """The newest checkpoint that holds, and the newer ones that don't."""

    path: Path | None
    manifest: Manifest | None = None
    passed_over: tuple[tuple[Path, str], ...] = ()
    """Each with the reason; newest first."""


def find_checkpoint(
    output_dir: Path,
    *,
    run_id: str | None = None,
    since: datetime | None = None,
    resumable: bool = False,
    deep: bool = False,
    excluding: Set[Path] = frozenset(),
) -> Found:
    """The newest checkpoint of `output_dir` that verifies.

    With `run_id` only of that run, with `since` only what was committed after, and `resumable`
    not one of a model without its training state. With `deep` every byte is hashed; without,
    large files are when they are loaded. One that then turns out to be damaged is given as
    `excluding`, to find the next.
    """
    passed_over: list[tuple[Path, str]] = []
    for path in newest_first(output_dir):
        if path in excluding:
            continue
        try:
            verified = verify_checkpoint(path, deep=deep)
        except CheckpointError as fault:
            passed_over.append((path, str(fault)))
            continue
        if run_id is not None and verified.manifest.run_id != run_id:
            passed_over.append((path, f"belongs to another run ({verified.manifest.run_id})"))
            continue
        if since is not None and committed_at(path, verified.manifest) < since:
            continue
        if resumable and verified.manifest.param_groups is None:
            passed_over.append((path, "holds a model only (save_only_model)"))
            continue
        return Found(path=path, manifest=verified.manifest, passed_over=tuple(passed_over))
    return Found(path=None, passed_over=tuple(passed_over))


def lost_manifest(path: Path) -> bool:
    """Whether bigtrain wrote in it and there is no manifest: nothing tells whether it is whole,
    and it must not be taken for another tool's, whose files it resembles."""
    return (path / PARTS).is_dir() and not (path / MANIFEST).is_file()


def require_checkpoint(path: Path) -> Path:
    """`path`, when it is a committed checkpoint; else an error that says what is there instead."""
    if path.is_dir() and (path / MANIFEST).is_file():
        read_manifest(path)
        return path
    raise CheckpointError(f"{path} {_what_is_there(path)}")


def _what_is_there(path: Path) -> str:
    if not path.exists():
        return f"does not exist; {_suggestion(path.parent)}"
    if not path.is_dir():
        return f"is a file, not a checkpoint's directory; {_suggestion(path.parent)}"
    if lost_manifest(path):
        return (
            f"has no {MANIFEST}: it was never committed, or has lost it, and nothing tells whether "
            f"it is whole; {_suggestion(path.parent)}"
        )
    if any(True for _ in committed(path)):
        return f"holds no checkpoint itself; {_suggestion(path)}"
    if not any(path.iterdir()):
        return "is empty; give a directory such as checkpoint-500"
    if (path / "config.json").is_file():
        return (
            f"is a model without training state (it has no {MANIFEST}); to start from its weights, "
            "give it as model.name"
        )
    return f"holds no checkpoint (it has no {MANIFEST}); {_suggestion(path.parent)}"


def _suggestion(directory: Path) -> str:
    names = [str(path) for _, path in committed(directory) if (path / MANIFEST).is_file()]
    if not names:
        return f"there is no checkpoint in {directory} either"
    return f"give one of {', '.join(names[:5])}"
