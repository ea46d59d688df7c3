"""Writes one rank's share into a staging, and makes a checkpoint of all ranks' shares. No torch.

    write_share   shards and small files, hashed and synced, then the rank's part     every rank
    commit        metadata, rank 0's part, manifest, rename                           rank 0

What ranks have to tell each other is in the staging itself: a rank's part appears there once all
that it names is on the disk; a rank that fails says so beside it. So it doesn't matter whether the
ranks themselves are still there.
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bigtrain.checkpoint import staging as stagings
from bigtrain.checkpoint.blocks import hash_bytes, hash_file
from bigtrain.checkpoint.formats.committed import read_committed
from bigtrain.checkpoint.manifest import MANIFEST, PARTS, Manifest, Part, part_name
from bigtrain.checkpoint.node_view import own_ranks, seen_from
from bigtrain.checkpoint.pieces import Share
from bigtrain.checkpoint.write_sharded import write_metadata, write_sharded
from bigtrain.checkpoint.write_whole import write_whole
from bigtrain.checkpoint.written import Written
from bigtrain.errors import CheckpointError

_POLL_S = 0.02
_POLL_AT_MOST_S = 0.5


@dataclass(frozen=True, kw_only=True)
class Destination:
    """Where a checkpoint comes into being, and what it is."""

    target: Path
    staging: Path
    needed: int
    """Bytes that all ranks write, at most."""
    root: Manifest
    """Still without its parts."""


def write_share(share: Share, destination: Destination) -> Written:
    """Write what the rank contributes, and the part that says so (rank 0's comes last of all)."""
    written = Written(destination.staging, rank=share.rank)
    if not written.staging.is_dir():
        raise CheckpointError(
            f"rank {share.rank} does not see {written.staging}, which rank 0 made: the output "
            "directory must be on storage that all nodes share, and only one attempt of a run may "
            "write to it"
        )
    with stagings.naming_failed_write(destination.target, needed=destination.needed):
        if share.layout == "sharded":
            write_sharded(share, written)
        elif share.is_head:
            write_whole(share, written)
        for name, content in share.objects.items():
            written.write_file(name, content)
        for name in share.caller_files:
            if name not in written.files:
                written.add_file(name, hash_file(written.staging / name, sync=True))
        if share.rank or destination.root.nodes:
            _write_part(written)
    return written


def commit(written: Written, destination: Destination) -> None:
    """Complete the staging with what only rank 0 can write, manifest last, and rename it."""
    staging, root = destination.staging, destination.root
    with stagings.naming_failed_write(destination.target, needed=destination.needed):
        others, hashes = _read_parts(staging, root.world_size)
        if root.layout == "sharded":
            write_metadata([written.part(), *others], written)
        part = written.part()
        hashes[part_name(written.rank)] = _write_part(written)
        manifest = dataclasses.replace(root, parts=dict(sorted(hashes.items())))
        read_committed(staging, manifest=manifest, parts=[part, *others]).check_tiling()
        _check_complete(staging, [part, *others])
        Written(staging, rank=written.rank).write_file(MANIFEST, manifest.to_bytes())
        stagings.commit(staging, destination.target, run_id=root.run_id)


def parts_here(destination: Destination) -> dict[str, bytes]:
    """What the ranks of this node have written of their parts: name → content."""
    names = map(part_name, sorted(own_ranks(destination.root)))
    return {name: (destination.staging / name).read_bytes() for name in names}


def commit_on_node(destination: Destination, contents: Mapping[str, bytes]) -> None:
    """Complete this node's staging with all nodes' parts and the manifest, and rename it. The
    node's head calls, once all ranks have written."""
    staging, root = destination.staging, destination.root
    own = own_ranks(root)
    with stagings.naming_failed_write(destination.target, needed=destination.needed):
        parts = [Part.from_bytes(contents[name]) for name in sorted(contents)]
        for part in parts:
            if part.rank not in own:
                name = part_name(part.rank)
                Written(staging, rank=part.rank).write_file(name, contents[name])
        hashes = {n: (len(c), hash_bytes(c).hex()) for n, c in sorted(contents.items())}
        manifest = dataclasses.replace(root, parts=hashes)
        seen = seen_from(manifest, parts)
        read_committed(staging, manifest=manifest, parts=seen).check_tiling()
        _check_complete(staging, [part for part in parts if part.rank in own])
        Written(staging, rank=min(own)).write_file(MANIFEST, manifest.to_bytes())
        stagings.commit(staging, destination.target, run_id=root.run_id)


def await_parts(destination: Destination, *, is_hopeless: Callable[[], bool]) -> None:
    """Wait until every rank but this one has written its part; CheckpointError once one failed."""
    directory, world_size = destination.staging / PARTS, destination.root.world_size
    missing = {Path(part_name(rank)).name for rank in range(1, world_size)}
    pause = _POLL_S
    while missing:
        names = set(_listed(directory))
        for name in sorted(names):
            if name.endswith(".failed"):
                raise CheckpointError((directory / name).read_text(encoding="utf-8"))
        missing -= names
        if not missing:
            return
        if is_hopeless():
            raise CheckpointError(
                f"{destination.target}: {len(missing)} of {world_size} ranks never wrote their "
                "share; it was not committed"
            )
        time.sleep(pause)
        pause = min(_POLL_AT_MOST_S, pause * 1.2)


def tell_failure(staging: Path, rank: int, message: str) -> None:
    """Let the rank that commits know; it may be too late for that."""
    path = staging / PARTS / f"rank-{rank:05d}.failed"
    try:
        path.parent.mkdir(exist_ok=True)
        partial = path.with_suffix(".saying")
        partial.write_text(message, encoding="utf-8")
        partial.rename(path)
    except OSError:
        return


def _listed(directory: Path) -> list[str]:
    try:
        # Opened anew each time: that is when NFS looks whether its copy is still right.
        return os.listdir(directory)  # noqa: PTH208 (names are all that is needed)
    except FileNotFoundError:
        return []


def _read_parts(staging: Path, world_size: int) -> tuple[list[Part], dict[str, tuple[int, str]]]:
    parts: list[Part] = []
    hashes: dict[str, tuple[int, str]] = {}
    for rank in range(1, world_size):
        name = part_name(rank)
        content = (staging / name).read_bytes()
        parts.append(Part.from_bytes(content))
        hashes[name] = len(content), hash_bytes(content).hex()
    return parts, hashes


def _check_complete(staging: Path, parts: Sequence[Part]) -> None:
    """Raise unless rank 0 sees every rank's files whole: the last look before the rename."""
    for part in parts:
        for name, digest in part.files.items():
            path = staging / name
            if not path.is_file() or path.stat().st_size != digest.size:
                raise CheckpointError(
                    f"{path}: is not there as its rank wrote it; the output directory must be on "
                    "storage that all nodes share, and no other attempt of this run may write to it"
                )


def _write_part(written: Written) -> tuple[int, str]:
    """Write the part; it has its name only once it is whole and on the disk."""
    content = written.part().to_bytes()
    name = part_name(written.rank)
    Written(written.staging, rank=written.rank).write_file(f"{name}.partial", content)
    path = written.staging / name
    path.with_name(f"{path.name}.partial").rename(path)
    return len(content), hash_bytes(content).hex()


def files_in(staging: Path) -> tuple[str, ...]:
    """What lies in a staging, by path relative to it."""
    return tuple(
        path.relative_to(staging).as_posix()
        for path in sorted(staging.rglob("*"))
        if path.is_file()
    )


def versions_of(packages: Sequence[str]) -> Mapping[str, str]:
    """The installed versions of those that are there, with Python's own."""
    import platform
    from importlib import metadata

    versions = {"python": platform.python_version()}
    for package in packages:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions
