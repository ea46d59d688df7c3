"""`bigtrain consolidate`: shows how far a consolidation is, and what it did."""

from __future__ import annotations

import contextlib
import json
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, TextIO

import typer

from bigtrain.errors import ConfigError
from bigtrain.faults import faults_told

if TYPE_CHECKING:
    from bigtrain.checkpoint.consolidate import Moved

EXAMPLES = (
    "\b\nExamples:\n"
    "  bigtrain consolidate runs/mine mine-final\n"
    "  bigtrain consolidate a-deepspeed-directory out --step 500 --dtype bf16 --verify\n"
    "  bigtrain consolidate runs/lora merged --merge-adapter --max-shard-size 2GB"
)
INTERRUPTED = 130
TERMINATED = 143
_TERMINAL_S = 0.1
_LINES_S = 10.0
"""Between two lines where no terminal shows them."""
_BAR = 24


class _Terminated(KeyboardInterrupt):
    """SIGTERM, which schedulers send."""


def consolidate(
    checkpoint: Annotated[
        Path,
        typer.Argument(metavar="CHECKPOINT", help="A checkpoint, or a directory of several."),
    ],
    output: Annotated[
        Path, typer.Argument(metavar="OUT", help="The model's directory; nothing is overwritten.")
    ],
    step: Annotated[
        int | None,
        typer.Option("--step", metavar="N", help="Of several. Default: the newest that holds."),
    ] = None,
    weights: Annotated[
        str, typer.Option("--weights", metavar="SET", help="Which, where there are more: ema, …")
    ] = "model",
    dtype: Annotated[
        str, typer.Option("--dtype", metavar="keep|fp32|bf16|fp16", help="Of floats.")
    ] = "keep",
    max_shard_size: Annotated[
        str, typer.Option("--max-shard-size", metavar="SIZE", help="Of one file: 5GB, 500MB, …")
    ] = "5GB",
    format_: Annotated[
        str,
        typer.Option("--format", metavar="safetensors|torch", help="torch: pytorch_model.bin."),
    ] = "safetensors",
    prefix: Annotated[
        str, typer.Option("--prefix", metavar="TEXT", help="To cut off names. auto: found out.")
    ] = "auto",
    merge_adapter: Annotated[
        bool, typer.Option("--merge-adapter", help="Add a LoRA adapter to its base model.")
    ] = False,
    jobs: Annotated[
        int | None, typer.Option("--jobs", metavar="N", help="Files that are written at a time.")
    ] = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Check all of the source; read the output back.")
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on where an attempt was interrupted.")
    ] = False,
    remove_source: Annotated[
        bool, typer.Option("--remove-source", help="Once the output is synced and read back.")
    ] = False,
    trust_times: Annotated[
        bool, typer.Option("--trust-times", help="Take files that were copied without theirs.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")] = False,
) -> None:
    """Make a model directory of any checkpoint.

    Sharded or not, as fast as a copy, for transformers' from_pretrained.

    Takes bigtrain's checkpoints, DeepSpeed's, torch's (DCP, FSDP), accelerate's, Lightning's and
    transformers'. Needs no GPU and little memory.
    """
    with (
        _sigterm_heard(),
        _faults_told(output, as_json=as_json),
        _shown(sys.stderr) as progress,
    ):
        from bigtrain.checkpoint.consolidate import Request, carry_out

        _check_places(checkpoint, output)
        summary = carry_out(
            Request(
                source=checkpoint,
                output=output,
                step=step,
                weights=weights,
                dtype=dtype,
                max_shard_size=max_shard_size,
                format=format_,
                prefix=prefix,
                merge_adapter=merge_adapter,
                jobs=jobs,
                verify=verify,
                resume=resume,
                remove_source=remove_source,
                trust_times=trust_times,
                progress=progress,
            )
        )
    if as_json:
        typer.echo(json.dumps(summary.to_json()))
    else:
        typer.echo("\n".join(summary.lines()))


def _check_places(checkpoint: Path, output: Path) -> None:
    inside = output.resolve()
    if checkpoint.resolve() in (inside, *inside.parents) and checkpoint.is_dir():
        raise ConfigError(
            f"{output} is {checkpoint} itself or lies inside it, where a later run would take it "
            "for a checkpoint; give a directory beside it"
        )


@contextlib.contextmanager
def _sigterm_heard() -> Iterator[None]:
    """SIGTERM interrupts as Ctrl-C does, once; where it is ignored or not Python's, it stays so."""
    before = signal.getsignal(signal.SIGTERM)
    is_main = threading.current_thread() is threading.main_thread()
    if before in (signal.SIG_IGN, None) or not is_main:  # only there handlers can be set
        yield
        return

    def interrupt(number: int, _frame: FrameType | None) -> None:
        signal.signal(number, signal.SIG_IGN)
        raise _Terminated

    signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def _faults_told(output: Path, *, as_json: bool) -> Iterator[None]:
    """Faults as everywhere; Ctrl-C and SIGTERM end in how to go on."""
    was_whole = _holds_something(output)
    try:
        with faults_told(as_json=as_json):
            yield
    except KeyboardInterrupt as signalled:
        from bigtrain.checkpoint.consolidate import partial_of

        partial, how = partial_of(output), ""
        if partial.is_dir():
            how = f"; {partial} is kept: go on with --resume"
        elif _holds_something(output) and not was_whole:
            how = f", but {output} is whole"
        typer.echo(f"interrupted{how}", err=True)
        code = TERMINATED if isinstance(signalled, _Terminated) else INTERRUPTED
        raise typer.Exit(code) from None


def _holds_something(directory: Path) -> bool:
    with contextlib.suppress(OSError):
        return any(directory.iterdir())
    return False


@contextlib.contextmanager
def _shown(stream: TextIO) -> Iterator[Callable[[Moved], None]]:
    """A function that shows progress: a bar on a terminal, else a line now and then."""
    bar = _Bar(stream) if stream.isatty() else _Lines(stream)
    try:
        yield bar
    finally:
        bar.close()


class _Lines:
    """For files, pipes and job logs."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._shown_at = time.monotonic()

    def __call__(self, moved: Moved) -> None:
        if time.monotonic() - self._shown_at >= _LINES_S:
            self._shown_at = time.monotonic()
            self._write(f"{progress_text(moved)}\n")

    def close(self) -> None:
        """Nothing to tidy."""

    def _write(self, text: str) -> None:
        with contextlib.suppress(OSError, ValueError):  # a reader that left ends no copy
            self._stream.write(text)
            self._stream.flush()


class _Bar(_Lines):
    """One line of a terminal, rewritten in place."""

    def __call__(self, moved: Moved) -> None:
        if time.monotonic() - self._shown_at >= _TERMINAL_S:
            self._shown_at = time.monotonic()
            filled = round(_BAR * _share(moved))
            bar = "━" * filled + " " * (_BAR - filled)
            self._write(f"\r\x1b[K{bar} {progress_text(moved)}")

    def close(self) -> None:
        """Leave an empty line for what comes next."""
        self._write("\r\x1b[K")


def progress_text(moved: Moved) -> str:
    """` 42%  1.3 of 3.1 GB  812 MB/s  0:02 left`."""
    gigabytes = f"{moved.done_bytes / 1e9:.1f} of {moved.total_bytes / 1e9:.1f} GB"
    parts = [f"{_share(moved):4.0%}", gigabytes, f"{moved.bytes_per_s / 1e6:.0f} MB/s"]
    if moved.eta_s is not None:
        minutes, seconds = divmod(round(moved.eta_s), 60)
        parts.append(f"{minutes}:{seconds:02d} left")
    return "  ".join(parts)


def _share(moved: Moved) -> float:
    return moved.done_bytes / moved.total_bytes if moved.total_bytes else 1.0
