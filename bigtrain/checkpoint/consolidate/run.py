"""A sharded checkpoint in, a Hugging Face model directory out: plan, copy, check, commit.

open_source ─> names ─> files ─> Copier per worker ─> checksums ─> (verify) ─> rename
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from bigtrain.checkpoint.consolidate.casting import KEEP, check_choice, target_dtype
from bigtrain.checkpoint.consolidate.journal import Staging, check_output
from bigtrain.checkpoint.consolidate.layout import (
    OutputFile,
    OutputTensor,
    index_json,
    parse_size,
    plan_files,
)
from bigtrain.checkpoint.consolidate.naming import AUTO, is_adapter, plain_names, split_adapter
from bigtrain.checkpoint.consolidate.side_files import (
    CONFIG,
    find_side_files,
    read_config,
    ties_embeddings,
    with_dtype,
)
from bigtrain.checkpoint.consolidate.stream import Copier, Stopped, WrittenFile
from bigtrain.checkpoint.consolidate.summary import FileSummary, Moved, Summary
from bigtrain.checkpoint.consolidate.verification import check_source, read_back
from bigtrain.checkpoint.index import TensorEntry
from bigtrain.checkpoint.source import MODEL, Source, open_source
from bigtrain.checkpoint.witness import find_damage
from bigtrain.errors import CheckpointError, ConfigError

logger = logging.getLogger(__name__)

_MOST_JOBS = 4
"""By default. More seldom pay, and each takes up to 15 MB."""
_REPORT_S = 0.2


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """All that is decided before the first byte."""

    source: Source
    files: tuple[OutputFile, ...]
    index_name: str
    side_files: dict[str, Path]
    config: dict[str, Any]
    warnings: tuple[str, ...]

    @property
    def nbytes(self) -> int:
        return sum(file.nbytes for file in self.files)

    def fingerprint(self) -> str:
        """The same for an attempt that may go on where another one stopped."""
        stats = [(str(path), path.stat()) for path in self.source.index.files if path.exists()]
        identity = [
            [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats],
            [(file.name, file.header.hex()) for file in self.files],
        ]
        return xxhash.xxh3_128_hexdigest(json.dumps(identity).encode())


def consolidate(
    source: Path | str,
    output: Path | str,
    *,
    step: int | None = None,
    weights: str = MODEL,
    dtype: str = KEEP,
    max_shard_size: int | str = "5GB",
    prefix: str = AUTO,
    jobs: int | None = None,
    verify: bool = False,
    resume: bool = False,
    remove_source: bool = False,
    trust_times: bool = False,
    progress: Callable[[Moved], None] | None = None,
) -> Summary:
    """Write the weights of the checkpoint `source` as a Hugging Face model into `output`.

    `source` may hold several steps: the newest that holds is taken, or `step`. `dtype` is keep,
    fp32, bf16 or fp16. With `verify`, all of the source's checksums are checked and the output is
    read back; `remove_source` implies it. `resume` goes on where an interrupted attempt stopped.
    CheckpointError says what is damaged, missing or not known; nothing half-written is left under
    the name of `output`.
    """
    started = time.monotonic()
    source, output = Path(source), Path(output)
    check_choice(dtype)
    limit = parse_size(max_shard_size)
    if jobs is not None and jobs < 1:
        raise ConfigError(f"jobs is {jobs}; it must be at least 1")
    check_output(output)
    found = open_source(source, step=step, trust_times=trust_times)
    if remove_source and found.path.resolve() in (output.resolve(), *output.resolve().parents):
        raise ConfigError(f"{output} lies inside {found.path}, which is to be removed")
    plan = _make_plan(found, weights=weights, dtype=dtype, limit=limit, prefix=prefix)
    verify = verify or remove_source
    staging = Staging(output, fingerprint=plan.fingerprint(), resume=resume)
    try:
        written, checked = _fill(plan, staging, jobs, progress, verify=verify)
        staging.commit()
    except _SystemError:
        raise
    except CheckpointError:
        staging.discard()
        raise
    finally:
        staging.close()
    if remove_source:
        shutil.rmtree(found.path)
    return _summarise(plan, output, written, checked, verify, remove_source, started)


def _fill(
    plan: _Plan,
    staging: Staging,
    jobs: int | None,
    progress: Callable[[Moved], None] | None,
    *,
    verify: bool,
) -> tuple[list[WrittenFile], str]:
    """Everything but the rename. An OSError leaves what there is, to go on with."""
    try:
        staging.check_space(plan.nbytes)
        written, checked = _copy_all(plan, staging, jobs, progress)
        if verify:
            checked = check_source(plan.source)
            read_back(plan.files, written, staging.path)
        _write_small(plan, staging)
    except OSError as fault:
        logger.warning("%s: kept, to go on with (--resume)", staging.path)
        raise _SystemError(f"{staging.path}: {fault.strerror or fault}") from fault
    return written, checked


class _SystemError(CheckpointError):
    """The system failed us; what was written is kept."""


def _make_plan(source: Source, *, weights: str, dtype: str, limit: int, prefix: str) -> _Plan:
    if weights not in source.sets:
        raise CheckpointError(
            f"{source.path} has no weights named {weights!r}; it has: {', '.join(source.sets)}"
        )
    chosen = source.sets[weights]
    side_files = find_side_files(source.path)
    config = read_config(side_files)
    stem = MODEL
    warnings: list[str] = []
    if is_adapter(chosen):
        named, stem = split_adapter(chosen)[1], "adapter_model"
        config = {}
        side_files.pop(CONFIG, None)
        if "adapter_config.json" not in side_files:
            warnings.append("there is no adapter_config.json beside the adapter; PEFT needs one")
    else:
        named = _named(source, chosen, prefix, tied=ties_embeddings(config))
        if not config:
            warnings.append("there is no config.json beside the weights; from_pretrained needs one")
    tensors = [
        OutputTensor(name=name, entry=entry, dtype=target_dtype(dtype, entry.dtype))
        for name, entry in named.items()
    ]
    return _Plan(
        source=source,
        files=tuple(plan_files(tensors, max_shard_size=limit, stem=stem)),
        index_name=f"{stem}.safetensors.index.json",
        side_files=side_files,
        config=with_dtype(config, _main_dtype(tensors)) if tensors else config,
        warnings=tuple(warnings),
    )


def _named(
    source: Source, chosen: dict[str, TensorEntry] | Any, prefix: str, *, tied: bool
) -> dict[str, TensorEntry]:
    """The tensors by their names in the output.

    A tied parameter's second name is left out where the configuration says that it is tied, as
    transformers does; else it becomes a copy, which any reader takes.
    """
    everything = dict(chosen)
    if not tied:
        for alias, owner in source.aliases.items():
            if owner in chosen and alias not in chosen:
                everything[alias] = chosen[owner]
    names = plain_names(
        [*everything, *(a for a in source.aliases if a not in everything)], prefix=prefix
    )
    return {names[name]: entry for name, entry in everything.items()}


def _main_dtype(tensors: Sequence[OutputTensor]) -> str:
    """The precision of most of the weights."""
    sizes: dict[str, int] = {}
    for tensor in tensors:
        if "float" in tensor.dtype.name:
            sizes[tensor.dtype.name] = sizes.get(tensor.dtype.name, 0) + tensor.entry.numel
    return max(sizes, key=lambda name: sizes[name]) if sizes else "float32"


def _copy_all(
    plan: _Plan,
    staging: Staging,
    jobs: int | None,
    progress: Callable[[Moved], None] | None,
) -> tuple[list[WrittenFile], str]:
    workers = min(len(plan.files), jobs or min(_MOST_JOBS, os.cpu_count() or 1))
    stopping = threading.Event()
    copiers = [Copier(plan.source.index, plan.source.find_record, stopping) for _ in range(workers)]
    idle = list(copiers)

    def copy(file: OutputFile) -> WrittenFile:
        copier = idle.pop()
        try:
            return copier.write(file, staging.path / file.name, staging.file(file.name))
        except BaseException:
            stopping.set()
            raise
        finally:
            idle.append(copier)

    try:
        with ThreadPoolExecutor(workers, thread_name_prefix="consolidate") as pool:
            futures = [pool.submit(copy, file) for file in plan.files]
            try:
                _watch(futures, copiers, plan.nbytes, progress)
            except BaseException:
                stopping.set()
                pool.shutdown(cancel_futures=True)
                raise
        _raise_damage(plan, copiers)
    finally:
        for copier in copiers:
            copier.close()
    return [future.result() for future in futures], _what_was_checked(copiers)


def _watch(
    futures: Sequence[Future[WrittenFile]],
    copiers: Sequence[Copier],
    total: int,
    progress: Callable[[Moved], None] | None,
) -> None:
    started = time.monotonic()
    pending: set[Future[WrittenFile]] = set(futures)
    while pending:
        done, pending = wait(pending, timeout=_REPORT_S, return_when=FIRST_EXCEPTION)
        faults = [fault for future in done if (fault := future.exception())]
        # The one that failed tells the others to stop.
        for fault in sorted(faults, key=lambda fault: isinstance(fault, Stopped)):
            raise fault
        if progress is not None:
            moved = sum(copier.done_bytes for copier in copiers)
            seconds = time.monotonic() - started
            progress(Moved(done_bytes=min(moved, total), total_bytes=total, seconds=seconds))


def _raise_damage(plan: _Plan, copiers: Sequence[Copier]) -> None:
    damaged = list(find_damage([copier.witness for copier in copiers]))
    if not damaged:
        return
    lines = []
    for each in damaged[:5]:
        names = plan.source.names_in(each.path, each.record.start, each.record.stop)
        shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if names[5:] else "")
        lines.append(
            f"{each.path}: bytes {each.record.start} to {each.record.stop} are not those that were "
            f"written (their checksum differs); in them: {shown or 'padding'}"
        )
    if damaged[5:]:
        lines.append(f"… and {len(damaged) - 5} more places")
    raise CheckpointError("\n".join([*lines, "the checkpoint is damaged; use another one"]))


def _what_was_checked(copiers: Sequence[Copier]) -> str:
    records = {
        (path, passage.record)
        for copier in copiers
        for path, passages in copier.witness.passages.items()
        for passage in passages
    }
    if not records:
        return "it stores no checksums; that its pieces tile every tensor was checked"
    own = any(record.xxh3 is not None for _, record in records)
    return f"the {'xxh3' if own else 'CRC-32'} of all {len(records)} records that were read holds"


def _write_small(plan: _Plan, staging: Staging) -> None:
    """The rest of the directory, the index last."""
    for name, path in plan.side_files.items():
        (staging.path / name).parent.mkdir(exist_ok=True)
        if name != CONFIG:
            staging.write_file(name, path.read_bytes())
    if plan.config:
        staging.write_file(CONFIG, json.dumps(plan.config, indent=2).encode() + b"\n")
    if len(plan.files) > 1:
        staging.write_file(plan.index_name, index_json(plan.files))


def _summarise(
    plan: _Plan,
    output: Path,
    written: Sequence[WrittenFile],
    checked: str,
    verified: bool,
    removed: bool,
    started: float,
) -> Summary:
    overflowed: dict[str, int] = {}
    for file in written:
        overflowed.update(file.overflowed)
    warnings = list(plan.warnings)
    if overflowed:
        worst = max(overflowed, key=lambda name: overflowed[name])
        warnings.append(
            f"{sum(overflowed.values())} finite values became infinite in {len(overflowed)} "
            f"tensors, most of them in {worst}; bf16 has the range of fp32"
        )
    return Summary(
        source=plan.source.path,
        kind=plan.source.kind,
        step=plan.source.step,
        output=output,
        files=tuple(
            FileSummary(name=f.name, nbytes=f.nbytes, xxh3=f.xxh3, tensors=f.tensors)
            for f in written
        ),
        side_files=tuple(sorted(plan.side_files)),
        seconds=time.monotonic() - started,
        source_checked=checked,
        verified=verified,
        source_removed=removed,
        overflowed=overflowed,
        warnings=tuple(warnings),
    )
