"""The copy itself: a few workers, a file of the output at a time each, and what they saw."""

from __future__ import annotations

import os
import resource
import threading
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from typing import NamedTuple

from bigtrain.checkpoint.consolidate.journal import SpoiledError, Staging
from bigtrain.checkpoint.consolidate.layout import OutputFile
from bigtrain.checkpoint.consolidate.plan import Plan
from bigtrain.checkpoint.consolidate.stream import Copier, Stopped, WrittenFile
from bigtrain.checkpoint.consolidate.summary import Moved
from bigtrain.checkpoint.witness import find_damage

_MOST_JOBS = 4
"""By default. More seldom pay, and each takes up to 15 MB."""
_REPORT_S = 0.2
_OTHER_FILES = 24
"""That the process has open, about, and those of the output."""


class Copied(NamedTuple):
    """What is on the disk now."""

    files: tuple[WrittenFile, ...]
    checked: str
    """Which checksums of the source were checked, in words."""


def copy_all(plan: Plan, staging: Staging) -> Copied:
    """Write every file of the plan; SpoiledError where the source is found damaged."""
    request = plan.request
    workers = min(len(plan.files), request.jobs or min(_MOST_JOBS, os.cpu_count() or 1))
    stopping, merging = threading.Event(), threading.Lock()
    copiers = [
        Copier(
            plan.source.index,
            plan.source.find_record,
            stopping,
            merging=merging,
            open_files=_open_files(workers),
        )
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
                _watch(futures, copiers, plan)
            except BaseException:
                stopping.set()
                pool.shutdown(cancel_futures=True)
                raise
        _raise_damage(plan, copiers)
    finally:
        for copier in copiers:
            copier.close()
    return Copied(tuple(future.result() for future in futures), _what_was_checked(copiers))


def _open_files(workers: int) -> int:
    """How many of the source's each worker may hold open, as the process is limited."""
    most, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if most == resource.RLIM_INFINITY:
        return 128
    return max(2, min(128, (most - _OTHER_FILES) // workers - 2))


def _watch(futures: Sequence[Future[WrittenFile]], copiers: Sequence[Copier], plan: Plan) -> None:
    started, total = time.monotonic(), plan.nbytes
    pending: set[Future[WrittenFile]] = set(futures)
    while pending:
        done, pending = wait(pending, timeout=_REPORT_S, return_when=FIRST_EXCEPTION)
        faults = [fault for future in done if (fault := future.exception())]
        # The one that failed tells the others to stop.
        for fault in sorted(faults, key=lambda fault: isinstance(fault, Stopped)):
            raise fault
        if plan.request.progress is not None:
            moved = min(total, sum(copier.done_bytes for copier in copiers))
            seconds = time.monotonic() - started
            plan.request.progress(Moved(done_bytes=moved, total_bytes=total, seconds=seconds))


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
    raise SpoiledError("\n".join([*lines, "the checkpoint is damaged; use another one"]))


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
