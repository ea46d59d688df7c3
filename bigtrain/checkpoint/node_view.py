"""A checkpoint on the nodes' own disks, as one of them sees it: see `nodes`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from bigtrain.checkpoint.blocks import FileDigest
from bigtrain.checkpoint.items import StoredItem
from bigtrain.checkpoint.manifest import Manifest, Part


def seen_from(manifest: Manifest, parts: Sequence[Part]) -> list[Part]:
    """The parts as the node of this directory uses them: what its own disk holds, and of the
    others' only what it doesn't."""
    if not manifest.nodes:
        return list(parts)
    own = own_ranks(manifest)
    seen: set[tuple[str, str, int, int]] = set()
    return [
        _without_known(part, seen)
        for part in sorted(parts, key=lambda part: (part.rank not in own, part.rank))
    ]


def own_ranks(manifest: Manifest) -> Sequence[int]:
    """The ranks whose files lie in this very directory."""
    if not manifest.nodes:
        return range(manifest.world_size)
    return manifest.nodes[manifest.node or 0].ranks


def elsewhere(manifest: Manifest, parts: Sequence[Part], checkpoint: Path) -> dict[Path, str]:
    """Of the files that lie on other nodes' disks, where."""
    own = own_ranks(manifest)
    near = {name for part in parts if part.rank in own for name in part.files}
    hosts = {rank: node.host for node in manifest.nodes for rank in node.ranks}
    return {
        checkpoint / name: (
            f"{checkpoint / name}: is on the disk of {hosts[part.rank]}, which wrote it as rank "
            f"{part.rank}; start the job on the same nodes in the same order with the same engine "
            "and number of ranks, or copy the nodes' directories together"
        )
        for part in parts
        if part.rank not in own
        for name in part.files
        if name not in near and not (checkpoint / name).exists()
    }


def _without_known(part: Part, seen: set[tuple[str, str, int, int]]) -> Part:
    items: list[StoredItem] = []
    for item in part.items:
        tensor = part.tensors[item.tensor]
        key = (tensor.name, tensor.kind, item.start, item.numel)
        if key not in seen:
            seen.add(key)
            items.append(item)
    return replace(part, items=tuple(items))


def digests_of(
    manifest: Manifest, parts: Sequence[Part], checkpoint: Path
) -> dict[Path, FileDigest]:
    """Of every file by its path; what is here counts before others' of the same name."""
    own = own_ranks(manifest)
    ordered = sorted(parts, key=lambda part: part.rank in own)
    return {checkpoint / name: digest for part in ordered for name, digest in part.files.items()}
