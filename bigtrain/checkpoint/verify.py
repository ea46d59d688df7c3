"""Is this checkpoint whole, and is it what was written?"""

from __future__ import annotations

import json
import logging
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import NoneType

from bigtrain.checkpoint.blocks import BLOCK_BYTES, FileDigest, FileReader, hash_bytes
from bigtrain.checkpoint.formats.committed import read_committed
from bigtrain.checkpoint.index import TensorIndex
from bigtrain.checkpoint.manifest import Manifest, Part, read_manifest, read_parts
from bigtrain.checkpoint.node_view import digests_of, elsewhere, own_ranks, seen_from
from bigtrain.checkpoint.torch_file import NO_ZIP
from bigtrain.errors import CheckpointError

logger = logging.getLogger(__name__)

_STATE_SUFFIXES = (".distcp", ".safetensors", ".pt", ".pth", ".metadata")
_TRAINER_STATE = "trainer_state.json"
_STATE_NAMES = (_TRAINER_STATE, "model.safetensors.index.json")
_TRAINER_VALUES: dict[str, tuple[type, ...]] = {
    "global_step": (int,),
    "epoch": (int, float, NoneType),
    "train_batch_size": (int, NoneType),
    "num_input_tokens_seen": (int,),
    "total_flos": (int, float),
    "log_history": (list,),
    "best_metric": (int, float, NoneType),
    "best_model_checkpoint": (str, NoneType),
}
"""Of the trainer's state, what training goes on from."""
_TRIED_BYTES = 64 << 10
"""Of a file of which every bit is tried: a second or two."""


@dataclass(frozen=True, kw_only=True)
class Fault:
    """One file that is not as it was written."""

    path: Path
    message: str
    is_state: bool
    """Whether training goes on from it. Others (config, tokenizer) a user may have edited."""
    is_edit: bool = False
    """Whether it still is what it is for: the trainer's state, which people edit."""
    is_slip: bool = False
    """Whether a single bit makes the difference, as no editor but many a disk does it."""

    def counts(self, *, lenient: bool) -> bool:
        """Whether a checkpoint with it is gone on from all the same."""
        if self.is_edit:
            return lenient or not self.is_slip
        return lenient and not self.is_state


@dataclass(frozen=True, kw_only=True)
class Verified:
    """A checkpoint whose manifest holds, with what was read of it on the way."""

    manifest: Manifest
    parts: tuple[Part, ...]
    index: TensorIndex
    digests: dict[Path, FileDigest]
    """Of every file, by its path."""
    elsewhere: dict[Path, str]
    """Files on other nodes' disks, each with what to say of it."""


def verify_checkpoint(checkpoint: Path, *, deep: bool = False, lenient: bool = False) -> Verified:
    """Raise CheckpointError unless the checkpoint holds.

    Checks the manifest, that all files are there in their size, the hashes of those of one block
    and of the trainer's state, and that the tensors are tiled without gap or overlap; with `deep`,
    all hashes. (Otherwise the larger files' are checked when they are read.) An edited
    `trainer_state.json` counts, with a warning, unless it is one flipped bit; `lenient`, for a
    checkpoint that was named, only warns of that, too, and of edited files from which training
    does not go on.
    """
    manifest = read_manifest(checkpoint)
    parts = tuple(read_parts(checkpoint, manifest=manifest))
    own = own_ranks(manifest)
    here = [part for part in parts if part.rank in own]
    faults = list(find_faults(checkpoint, here, deep=deep))
    for fault in faults:
        if fault.counts(lenient=lenient):
            logger.warning("%s; resuming all the same", fault.message)
    grave = [fault.message for fault in faults if not fault.counts(lenient=lenient)]
    if grave:
        raise CheckpointError("\n".join(grave))
    index = read_committed(checkpoint, manifest=manifest, parts=seen_from(manifest, parts))
    try:
        index.check_tiling()
    except CheckpointError as fault:
        raise CheckpointError(f"{checkpoint}: {fault}") from fault
    return Verified(
        manifest=manifest,
        parts=parts,
        index=index,
        digests=digests_of(manifest, parts, checkpoint),
        elsewhere=elsewhere(manifest, parts, checkpoint) if manifest.nodes else {},
    )


def find_faults(checkpoint: Path, parts: Sequence[Part], *, deep: bool) -> Iterator[Fault]:
    """The files that are missing, of another size, or (where hashed) of other content."""
    for part in parts:
        for name, digest in part.files.items():
            path = checkpoint / name
            hashed = deep or name in _STATE_NAMES  # these are never read block by block
            message = _fault_of(path, digest, hashed=hashed)
            if message is None:
                continue
            if name == _TRAINER_STATE and path.is_file():
                yield _fault_of_trainer_state(path, digest)
            else:
                yield Fault(path=path, message=message, is_state=_is_state(name))


def require_trainer_state(path: Path) -> None:
    """CheckpointError unless the file holds what a trainer goes on from, in values of its kind."""
    try:
        state = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as fault:
        raise _no_trainer_state(path, str(fault)) from fault
    if not isinstance(state, dict):
        raise _no_trainer_state(path, "it is no JSON object")
    if "global_step" not in state:
        raise _no_trainer_state(path, "it has no global_step")
    for name, kinds in _TRAINER_VALUES.items():
        value = state.get(name)
        if name in state and (not isinstance(value, kinds) or isinstance(value, bool)):
            raise _no_trainer_state(path, f"its {name} is {json.dumps(value)[:40]}")
    if state["global_step"] < 0:
        raise _no_trainer_state(path, f"its global_step is {state['global_step']}")


def require_whole_zip(path: Path) -> None:
    """CheckpointError unless every record of a `torch.save` zip is what its CRC-32 says. Files of
    another kind have none, nor those for which torch was told to compute none."""
    if not zipfile.is_zipfile(path):
        return
    try:
        with zipfile.ZipFile(path) as zipped:
            are_stored = any(record.CRC for record in zipped.infolist())
            damaged = zipped.testzip() if are_stored else None
    except NO_ZIP as fault:
        raise CheckpointError(f"{path}: is damaged ({fault}); use another checkpoint") from fault
    if damaged is not None:
        raise CheckpointError(
            f"{path}: its record {damaged} is not as it was written; use another checkpoint, or "
            "remove the file to go on without it"
        )


def _no_trainer_state(path: Path, why: str) -> CheckpointError:
    return CheckpointError(
        f"{path} is no trainer's state ({why}); mend it, or go on from another checkpoint"
    )


def _fault_of_trainer_state(path: Path, digest: FileDigest) -> Fault:
    """What to hold of one that is not as it was written."""
    try:
        require_trainer_state(path)
    except CheckpointError as fault:
        return Fault(path=path, message=str(fault), is_state=True)
    is_slip = _is_slip(path, digest)
    message = f"{path}: was edited after it was saved, and what it says now counts"
    if is_slip:
        message = (
            f"{path}: one bit of it is not as it was written; if that was an edit, give the "
            "checkpoint by its path"
        )
    return Fault(path=path, message=message, is_state=True, is_edit=True, is_slip=is_slip)


def _fault_of(path: Path, digest: FileDigest, *, hashed: bool) -> str | None:
    try:
        if not path.is_file():
            return f"{path}: is missing"
        reader = FileReader(path, digest)
    except CheckpointError as fault:
        return str(fault)
    except OSError as fault:
        return f"{path}: can't be read: {fault.strerror}"
    try:
        if hashed or digest.size <= BLOCK_BYTES:
            reader.check()
    except CheckpointError as fault:
        return str(fault)
    finally:
        reader.close()
    return None


def _is_slip(path: Path, digest: FileDigest) -> bool:
    """Whether a single bit flipped back makes the file what was written. Of one that is too large
    to try, whether its size alone allows it."""
    content = bytearray(path.read_bytes())
    if len(content) != digest.size or len(content) > _TRIED_BYTES:
        return len(content) == digest.size
    for place in range(len(content)):
        kept = content[place]
        for bit in range(8):
            content[place] = kept ^ (1 << bit)
            if hash_bytes(content) == digest.blocks:
                return True
        content[place] = kept
    return False


def _is_state(name: str) -> bool:
    return name.endswith(_STATE_SUFFIXES) or name in _STATE_NAMES
