"""A checkpoint's directory comes into being at once, or not at all.

    checkpoint-500.tmp-<run>-<id>    staged: being written
    checkpoint-500                   committed: renamed, after all of it is on the disk
    checkpoint-500.old-<run>-<id>    set aside while the same step is committed again
    checkpoint-500.gone-<run>-<id>   being deleted

`<run>` is a hash of the run's id: a run that starts again clears what its dead attempts left, and
nothing of anyone else's. An attempt that lives on elsewhere finds its staging gone and fails.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import shutil
import uuid
from collections.abc import Iterator, Set
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import xxhash

from bigtrain.checkpoint.manifest import MANIFEST, Manifest, read_manifest
from bigtrain.errors import CheckpointError

logger = logging.getLogger(__name__)

_NAME = re.compile(r"^checkpoint-(\d+)$")
_LEFTOVER = re.compile(
    r"^(?P<target>.+)\.(?P<role>tmp|old|gone)-(?P<run>[0-9a-f]{16})-[0-9a-f]{32}$"
)
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
_HELP = {
    errno.EFBIG: "no file may be so large here: raise the limit that ulimit -f shows, or take a "
    "file system without one",
    errno.EDQUOT: "your quota there is used up: free some, lower save_total_limit, or give another "
    "--output-dir",
    errno.EROFS: "give another --output-dir",
    errno.EACCES: "give an --output-dir that you may write to",
    errno.EIO: "the disk or its server is at fault",
}
"""What helps against a cause other than a full disk."""


def new_staging(target: Path, *, run_id: str) -> Path:
    """A fresh directory beside `target`; one rank makes it and tells the others."""
    staging = _beside(target, role="tmp", run_id=run_id)
    try:
        staging.mkdir(parents=True)
    except OSError as fault:
        raise CheckpointError(
            f"{staging}: can't be made: {fault.strerror}; give an output directory that can be "
            "written to"
        ) from fault
    return staging


def commit(staging: Path, target: Path, *, run_id: str) -> None:
    """Give the finished `staging` its name. Afterwards it survives a loss of power.

    Neither an overwrite nor a rename onto a directory: a step that is reached again sets the old
    directory aside, which stays whole until the new one is committed.
    """
    _sync_tree(staging)
    aside: Path | None = None
    if target.exists():
        aside = _beside(target, role="old", run_id=run_id)
        target.rename(aside)
    try:
        staging.rename(target)
    except OSError as fault:
        if aside is not None:
            aside.rename(target)
        raise CheckpointError(
            f"{target}: can't be committed: {fault.strerror}; {staging.name} is gone or not "
            "ours any more (does another attempt of this run write here?)"
        ) from fault
    sync_directory(target.parent)
    if aside is not None:
        discard(aside)


def clear_leftovers(output_dir: Path, *, run_id: str, keep: Set[Path] = frozenset()) -> None:
    """Remove what dead attempts of this run left; restore what one of them had set aside."""
    for path in _leftovers(output_dir):
        match = _LEFTOVER.match(path.name)
        if match is None or match["run"] != _tag(run_id) or path in keep:
            continue
        target = output_dir / match["target"]
        if match["role"] == "old" and not target.exists() and (path / MANIFEST).exists():
            logger.info("%s: restored, its replacement was never committed", target)
            path.rename(target)
        else:
            discard(path)


def committed(output_dir: Path) -> list[tuple[int, Path]]:
    """(step, directory) of what looks committed, by name; the newest first.

    Holds also what was set aside when a run died before it could commit the replacement.
    """
    found: list[tuple[int, Path]] = []
    for path in _subdirectories(output_dir):
        leftover = _LEFTOVER.match(path.name)
        name = path.name
        if leftover and leftover["role"] == "old":
            name = leftover["target"]
            if (output_dir / name).exists():
                continue
        if match := _NAME.match(name):
            found.append((int(match[1]), path))
    return sorted(found, reverse=True)


def newest_first(output_dir: Path) -> list[Path]:
    """What looks committed, by when it was: a run that began anew in an old one's directory, or
    went on from an earlier step, is newer than what it left behind at later steps.

    What has no readable manifest comes first: it may be newer than all that has.
    """
    ranked = []
    for step, path in committed(output_dir):
        try:
            created = read_manifest(path).created
        except CheckpointError:
            created = "~"  # sorts behind every date
        ranked.append((created, step, path))
    return [path for _, _, path in sorted(ranked, reverse=True)]


def committed_at(path: Path, manifest: Manifest) -> datetime:
    """By the clock of who wrote it or of who keeps the files, whichever is later."""
    kept = (path / MANIFEST).stat().st_mtime
    return max(datetime.fromisoformat(manifest.created), datetime.fromtimestamp(kept, tz=UTC))


def time_of_commit(output_dir: Path) -> str:
    """Now; but after every other checkpoint there, also where this node's clock is behind that
    of the one that wrote them."""
    now = datetime.now(UTC)
    for _, path in committed(output_dir):
        try:
            before = datetime.fromisoformat(read_manifest(path).created)
        except (CheckpointError, ValueError):
            continue
        now = max(now, before + timedelta(microseconds=1))
    return now.isoformat(timespec="microseconds")


def kept_at_most(limit: int | None, *, protected: int) -> int | None:
    """How many checkpoints stay under a `save_total_limit`, of which `protected` may not go; None:
    all. As in transformers: with a limit of one the newest stays beside the best."""
    return None if limit is None or limit <= 0 else max(limit, protected)


def rotate(
    output_dir: Path,
    *,
    run_id: str,
    keep: int,
    protect: Set[Path] = frozenset(),
    spare_newest: bool = True,
) -> list[Path]:
    """Remove the oldest committed checkpoints of this run beyond `keep`; those that went.

    Called on one rank, after a commit. `protect` stay whatever their age, and count; and so does
    the newest, which training goes on from, unless that is over (`spare_newest=False`).
    """
    ours = [path for path in newest_first(output_dir) if _is_of_run(path, run_id)]
    protected = {path.resolve() for path in protect}
    spare = len(ours) - max(1, keep)
    removed: list[Path] = []
    for path in reversed(ours[1:] if spare_newest else ours):
        if len(removed) >= spare:
            break
        if path.resolve() not in protected:
            _delete(path, gone=_beside(path, role="gone", run_id=run_id))
            removed.append(path)
    return removed


def discard(leftover: Path) -> None:
    """Remove a staging that will not be committed, or what was set aside. It may be gone."""
    match = _LEFTOVER.match(leftover.name)
    if match is None:
        raise ValueError(f"{leftover} is not a staging")
    gone = f"{match['target']}.gone-{match['run']}-{uuid.uuid4().hex}"
    _delete(leftover, gone=leftover.with_name(gone))


def check_space(directory: Path, *, needed: int) -> None:
    """Raise unless the file system of `directory` has `needed` bytes free."""
    free = free_bytes(directory)
    if needed > free:
        raise CheckpointError(disk_full(directory, needed=needed, free=free))


def free_bytes(directory: Path) -> int:
    """What an ordinary user can still write there."""
    system = os.statvfs(directory)
    return system.f_bavail * system.f_frsize


def disk_full(directory: Path, *, needed: int, free: int) -> str:
    """The message of a checkpoint that doesn't fit."""
    takes, has = readable_size(needed), readable_size(free)
    return (
        f"no space for the checkpoint in {directory}: it takes {takes}, {has} are free; free some "
        "or lower save_total_limit. Earlier checkpoints are untouched"
    )


@contextmanager
def naming_failed_write(target: Path, *, needed: int) -> Iterator[None]:
    """Turns a write for the checkpoint `target` that the system refuses into an error that names
    the checkpoint, the cause and what helps."""
    directory = target.parent
    try:
        yield
    except CheckpointError:
        raise
    except Exception as fault:
        number = _errno_of(fault)
        if number in _HELP:
            raise CheckpointError(
                f"{target} could not be saved, which takes {readable_size(needed)}: "
                f"{os.strerror(number)}; {_HELP[number]}. Earlier checkpoints are untouched"
            ) from fault
        if is_out_of_space(fault, directory, needed=needed):
            free = free_bytes(directory)
            raise CheckpointError(disk_full(directory, needed=needed, free=free)) from fault
        raise


def _errno_of(fault: Exception) -> int:
    """The system's number for what failed; 0 where there is none."""
    number = getattr(fault, "errno", None)
    told = re.search(r"os error (\d+)", str(fault))  # as safetensors says it
    return number if isinstance(number, int) else int(told[1]) if told else 0


def is_out_of_space(fault: Exception, directory: Path, *, needed: int) -> bool:
    """Whether a write of `needed` bytes into the directory failed for want of space."""
    if _errno_of(fault) in _NO_SPACE:
        return True
    # Libraries hide the cause (safetensors, torch.save): then the space left tells.
    return free_bytes(directory) < min(needed, 1 << 20)


def sync_directory(path: Path) -> None:
    """Bring the directory's own entries to the disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _sync_tree(root: Path) -> None:
    for path in sorted(root.rglob("*"), reverse=True):
        if path.is_dir():
            sync_directory(path)
    sync_directory(root)


def _is_of_run(path: Path, run_id: str) -> bool:
    try:
        return read_manifest(path).run_id == run_id
    except CheckpointError:
        return False


def _delete(path: Path, *, gone: Path) -> None:
    """Delete `path`, which first gets a name under which nobody finds, fills or commits it."""
    try:
        path.rename(gone)
    except FileNotFoundError:
        return
    if gone.is_symlink():
        gone.unlink()  # what it leads to lies elsewhere, and is the user's
        return
    shutil.rmtree(gone, ignore_errors=True)
    if gone.exists():
        logger.warning("%s: could not be removed whole; remove it by hand", gone)


def _beside(target: Path, *, role: str, run_id: str) -> Path:
    return target.with_name(f"{target.name}.{role}-{_tag(run_id)}-{uuid.uuid4().hex}")


def _tag(run_id: str) -> str:
    return xxhash.xxh3_64_hexdigest(run_id.encode())


def _leftovers(output_dir: Path) -> list[Path]:
    return [path for path in _subdirectories(output_dir) if _LEFTOVER.match(path.name)]


def _subdirectories(output_dir: Path) -> list[Path]:
    try:
        return sorted(path for path in output_dir.iterdir() if path.is_dir())
    except (FileNotFoundError, NotADirectoryError):
        return []


def readable_size(count: int, *, digits: int = 1) -> str:
    """`1.3 GB`."""
    size, unit = float(count), "bytes"
    for larger in ("KB", "MB", "GB", "TB"):
        if size < 1000:
            break
        size, unit = size / 1000, larger
    return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.{digits}f} {unit}"
