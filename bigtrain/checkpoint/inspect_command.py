"""`bigtrain inspect`: prints what `inspect` finds."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bigtrain.faults import faults_told
from bigtrain.printable import printable

if TYPE_CHECKING:
    from bigtrain.checkpoint.inspect import Inspection

EXAMPLES = (
    "\b\nExamples:\n"
    "  bigtrain inspect runs/mine/checkpoint-500 --verify\n"
    "  bigtrain inspect runs/mine/checkpoint-500 --diff runs/mine/checkpoint-400\n"
    "  bigtrain inspect a-deepspeed-directory --tensors"
)


def inspect(
    checkpoint: Annotated[
        Path,
        typer.Argument(metavar="CHECKPOINT", help="A checkpoint, or a directory of several."),
    ],
    verify: Annotated[
        bool, typer.Option("--verify", help="Read all of it, and check every hash or checksum.")
    ] = False,
    diff: Annotated[
        Path | None,
        typer.Option("--diff", metavar="OTHER", help="Which tensors differ, and by how much."),
    ] = None,
    tensors: Annotated[bool, typer.Option("--tensors", help="List every tensor.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")] = False,
) -> None:
    """Show, verify or compare checkpoints.

    bigtrain's, DeepSpeed's, torch's, transformers' and accelerate's.

    Leaves with 1 where --verify finds a fault or --diff a difference.
    """
    with faults_told(as_json=as_json):
        code = run(
            checkpoint,
            check=verify,
            other=diff,
            all_tensors=tensors,
            as_json=as_json,
            say=lambda line: typer.echo(printable(line)),
        )
    raise typer.Exit(code)


def run(
    path: Path,
    *,
    check: bool = False,
    other: Path | None = None,
    all_tensors: bool = False,
    as_json: bool = False,
    say: Callable[[str], None],
) -> int:
    """Describe the checkpoint at `path` by calling `say` with lines; the exit code.

    `check` verifies every hash; `other` is a checkpoint to compare with. Leaves with 1 when a fault
    or a difference was found. Raises CheckpointError.
    """
    # Here, so that the command line's help answers at once.
    from bigtrain.checkpoint.inspect import as_values, describe, inspect_checkpoint, verify

    found = inspect_checkpoint(path)
    faults = [_fault(fault) for fault in verify(found)] if check else None
    differing = _differing(found, other) if other is not None else None
    if as_json:
        values = as_values(found) | {"faults": faults, "differences": differing}
        say(json.dumps(values))
    else:
        for line in describe(found, all_tensors=all_tensors):
            say(line)
        _say_findings(found, faults, differing, other, say)
    return 1 if faults or differing else 0


def _fault(fault: Any) -> dict[str, Any]:
    return {"path": str(fault.path), "message": fault.message, "tensors": list(fault.tensors)}


def _differing(found: Inspection, other: Path) -> list[dict[str, Any]]:
    from bigtrain.checkpoint.compare import differences
    from bigtrain.checkpoint.inspect import inspect_checkpoint

    return [_plain(vars(each)) for each in differences(found, inspect_checkpoint(other))]


def _plain(difference: dict[str, Any]) -> dict[str, Any]:
    """With what JSON has no number for as a word."""
    largest = difference["largest"]
    is_infinite = largest is not None and not math.isfinite(largest)
    return {**difference, "largest": str(largest) if is_infinite else largest}


def _say_findings(
    found: Inspection,
    faults: list[dict[str, Any]] | None,
    differing: list[dict[str, Any]] | None,
    other: Path | None,
    say: Callable[[str], None],
) -> None:
    from bigtrain.checkpoint.witness import no_records

    if faults is not None:
        stored = sum(len(part.files) for part in found.parts)
        whole = f"{stored} files are as they were written"
        if not stored:
            whole = "no fault was found"
            if found.find_record is no_records:
                whole = "no checksums are stored; every element is there once"
        count = f"{len(faults)} fault{'s' * (len(faults) > 1)}:"
        say(f"  verified     {count if faults else whole}")
        for fault in faults:
            say(f"    {fault['message']}")
            for line in _listed(fault["tensors"]):
                say(f"      holds {line}")
    if differing is not None:
        say(f"  against      {other}: {_tensors(len(differing))}")
        for each in differing:
            say(f"    {each['name']} ({each['kind']}): {_how(each)}")


def _tensors(count: int) -> str:
    return "1 tensor differs" if count == 1 else f"{count} tensors differ"


def _listed(tensors: list[str], most: int = 8) -> Iterable[str]:
    yield from tensors[:most]
    if len(tensors) > most:
        yield f"{len(tensors) - most} more"


def _how(difference: dict[str, Any]) -> str:
    if difference["count"] is None:
        return str(difference["what"])
    largest = difference["largest"]
    return f"{difference['what']}: {difference['count']} elements, at most by {float(largest):.3g}"
