"""A sharded checkpoint in, a Hugging Face model directory out: plan, copy, check, commit.

open_source ─> names ─> files ─> Copier per worker ─> checksums ─> (verify) ─> rename
"""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from pathlib import Path

from bigtrain.checkpoint.consolidate.casting import KEEP, check_choice
from bigtrain.checkpoint.consolidate.journal import KeptError, Staging, check_output
from bigtrain.checkpoint.consolidate.layout import (
    SAFETENSORS,
    OutputFile,
    index_json,
    output_format,
    parse_size,
)
from bigtrain.checkpoint.consolidate.naming import AUTO
from bigtrain.checkpoint.consolidate.plan import Choices, Plan, make_plan
from bigtrain.checkpoint.consolidate.removal import check_removable, removed
from bigtrain.checkpoint.consolidate.side_files import CONFIG
from bigtrain.checkpoint.consolidate.stream import Copier, Stopped, WrittenFile
from bigtrain.checkpoint.consolidate.summary import FileSummary, Moved, Summary
from bigtrain.checkpoint.consolidate.verification import check_source, read_back
from bigtrain.checkpoint.source import MODEL, open_source
from bigtrain.checkpoint.witness import find_damage
from bigtrain.errors import CheckpointError, ConfigError

logger = logging.getLogger(__name__)

_MOST_JOBS = 4
"""By default. More seldom pay, and each takes up to 15 MB."""
_REPORT_S = 0.2


def consolidate(
    source: Path | str,
    output: Path | str,
    *,
    step: int | None = None,
    weights: str = MODEL,
    dtype: str = KEEP,
    max_shard_size: int | str = "5GB",
    prefix: str = AUTO,
    format: str = SAFETENSORS,
    merge_adapter: bool = False,
    jobs: int | None = None,
    verify: bool = False,
    resume: bool = False,
    remove_source: bool = False,
    trust_times: bool = False,
    progress: Callable[[Moved], None] | None = None,
) -> Summary:
    """Write the weights of the checkpoint `source` as a Hugging Face model into `output`.

    `source` may hold several steps: the newest that holds is taken, or `step`. `dtype` is keep,
    fp32, bf16 or fp16; `format` safetensors or torch (`pytorch_model.bin`). `merge_adapter` adds a
    LoRA adapter to its model. With `verify`, all of the source's checksums are checked and the
    output is read back; `remove_source` implies it. `resume` goes on where an interrupted attempt
    stopped.
    CheckpointError says what is damaged, missing or not known; nothing half-written is left under
    the name of `output`.
    """
    started = time.monotonic()
    source, output = Path(source), Path(output)
    check_choice(dtype)
    output_format(format)
    choices = Choices(
        weights=weights,
        dtype=dtype,
        limit=parse_size(max_shard_size),
        prefix=prefix,
        format=format,
        merge_adapter=merge_adapter,
    )
    if jobs is not None and jobs < 1:
        raise ConfigError(f"jobs is {jobs}; it must be at least 1")
    try:
        check_output(output)
        output = output.resolve()
        plan = make_plan(open_source(source, step=step, trust_times=trust_times), choices)
        if remove_source:
            check_removable(plan, output, is_chosen=step is not None)
        staging = Staging(output, fingerprint=plan.fingerprint(), resume=resume)
    except OSError as fault:
        raise CheckpointError(f"{fault.filename or source}: {fault.strerror or fault}") from fault
    verify = verify or remove_source
    try:
        written, checked = _fill(plan, staging, jobs, progress, verify=verify)
        staging.commit()
    except KeptError:
        logger.warning("%s: kept, to go on with (--resume)", staging.path)
        raise
    except CheckpointError:
        staging.discard()
        raise
    finally:
        staging.close()
    summary = _summarise(plan, output, written, checked, verify, started)
    return removed(plan, summary) if remove_source else summary


def _fill(
    plan: Plan,
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
        where = fault.filename or staging.path
        raise KeptError(f"{where}: {fault.strerror or fault}") from fault
    return written, checked


def _copy_all(
    plan: Plan,
    staging: Staging,
    jobs: int | None,
    progress: Callable[[Moved], None] | None,
) -> tuple[list[WrittenFile], str]:
    workers = min(len(plan.files), jobs or min(_MOST_JOBS, os.cpu_count() or 1))
    stopping = threading.Event()
    merging = threading.Lock()
    copiers = [
        Copier(plan.source.index, plan.source.find_record, stopping, merging=merging)
        for _ in range(workers)
    ]
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


def _raise_damage(plan: Plan, copiers: Sequence[Copier]) -> None:
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


def _write_small(plan: Plan, staging: Staging) -> None:
    """The rest of the directory, the index last."""
    for name, path in plan.side_files.items():
        (staging.path / name).parent.mkdir(exist_ok=True)
        if name != CONFIG:
            staging.write_file(name, path.read_bytes())
    if plan.config and CONFIG in plan.side_files:
        staging.write_file(CONFIG, json.dumps(plan.config, indent=2).encode() + b"\n")
    if len(plan.files) > 1:
        staging.write_file(plan.index_name, index_json(plan.files))


def _summarise(
    plan: Plan,
    output: Path,
    written: Sequence[WrittenFile],
    checked: str,
    verified: bool,
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
        source_removed=False,
        overflowed=overflowed,
        warnings=tuple(warnings),
    )
