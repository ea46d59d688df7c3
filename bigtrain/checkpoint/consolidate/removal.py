"""The source's end, after its output was read back: only where all that goes is the checkpoint's.

Directories hold more than a checkpoint at times: other steps, logs, what people put there. What
isn't known by name to belong to a checkpoint is a reason to remove nothing.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from bigtrain.checkpoint.consolidate.plan import Plan
from bigtrain.checkpoint.consolidate.side_files import is_side_file
from bigtrain.checkpoint.consolidate.summary import Summary
from bigtrain.checkpoint.json_object import indexed_files
from bigtrain.checkpoint.manifest import MANIFEST, read_manifest, read_parts
from bigtrain.checkpoint.source import Source
from bigtrain.errors import CheckpointError, ConfigError

_FILES = re.compile(
    r"^(latest|zero_to_fp32\.py|README\.md|\.metadata|.*_states\.pt|.*\.distcp|meta\.pt"
    r"|trainer_state\.json|training_args\.bin|(optimizer|scheduler|scaler)(_\d+)?\.(pt|bin)"
    r"|rng_state.*\.pth|random_states_\d+\.pkl|(sampler|dl_state_dict).*\.bin"
    r"|custom_checkpoint_\d+\.pkl)$"
)
"""Weights are not among them: a second model's may lie beside those that were read."""
_DIRECTORIES = re.compile(r"^(optimizer(_\d+)?|additional_chat_templates)$")


def check_removable(plan: Plan) -> None:
    """Raise where removing the source would take more along than what the output holds."""
    source, output = plan.source, plan.request.output
    where = source.path.resolve()
    if where in (output.resolve(), *output.resolve().parents):
        raise ConfigError(f"{output} lies inside {source.path}, which is to be removed")
    reasons = []
    if source.path.is_symlink():
        reasons.append("it is a link; give the directory that it leads to")
    if source.passed_over and plan.request.step is None:
        reasons.append("newer ones can't be used; give --step if it is meant")
    if len(source.sets) > 1:
        reasons.append(f"it holds several sets of weights ({', '.join(source.sets)})")
    if plan.leaves_out:
        reasons.append("it holds the model's weights beside the adapter that is written")
    if others := _others_told(source):
        reasons.append(others)
    if reasons:
        raise ConfigError(
            f"{source.path} can't be removed (--remove-source): {'; '.join(reasons)}; leave out "
            "--remove-source, and remove it yourself"
        )


def removed(plan: Plan, summary: Summary) -> Summary:
    """Remove the source; the summary of that, or why it is kept."""
    path = plan.source.path
    if summary.overflowed:
        why = f"{path} was kept: it holds the values that became infinite"
        return replace(summary, warnings=(*summary.warnings, why))
    if others := _others_told(plan.source):  # they came meanwhile
        return replace(summary, warnings=(*summary.warnings, f"{path} was kept: {others}"))
    try:
        shutil.rmtree(path)
    except OSError as fault:
        why = f"{path} could not be removed: {fault.filename}: {fault.strerror}"
        return replace(summary, warnings=(*summary.warnings, why))
    return replace(summary, source_removed=True)


def _others_told(source: Source) -> str | None:
    others = sorted(_others_of_own(source) if source.is_own else _others(source))
    more = f" and {len(others) - 3} more" if others[3:] else ""
    if not others:
        return None
    return f"{', '.join(others[:3])}{more} in it are not known to belong to it"


def _others_of_own(source: Source) -> Iterator[str]:
    """What lies in the directory and the manifest doesn't name."""
    manifest = read_manifest(source.path)
    known = {MANIFEST, *manifest.parts}
    known |= {name for part in read_parts(source.path, manifest=manifest) for name in part.files}
    for path in source.path.rglob("*"):
        name = str(path.relative_to(source.path))
        if name not in known and (path.is_symlink() or not path.is_dir()):
            yield name


def _others(source: Source) -> Iterator[str]:
    """What lies in the source's directory and is not known to be the checkpoint's."""
    for path in source.path.iterdir():
        if not path.is_dir() or path.is_symlink():
            if not _is_known(path, source):
                yield path.name
        elif _DIRECTORIES.match(path.name) or any(path in f.parents for f in source.index.files):
            inner = [each for each in path.rglob("*") if not each.is_dir()]
            if path.name != "additional_chat_templates":
                yield from (f"{path.name}/{p.name}" for p in inner if not _is_known(p, source))
        else:
            yield f"{path.name}/"


def _is_known(path: Path, source: Source) -> bool:
    if path.is_symlink():
        return False
    if path in source.index.files or _FILES.match(path.name) or is_side_file(path):
        return True
    return path.name.endswith(".index.json") and _indexes_what_was_read(path, source)


def _indexes_what_was_read(index: Path, source: Source) -> bool:
    try:
        return set(indexed_files(index)) <= set(source.index.files)
    except CheckpointError:
        return False
