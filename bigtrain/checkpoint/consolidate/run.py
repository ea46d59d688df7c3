"""A sharded checkpoint in, a Hugging Face model directory out: plan, copy, check, commit.

Request ─> open_source ─> Plan ─> copy_all ─> checksums ─> (verify) ─> rename ─> Summary
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

from bigtrain.checkpoint.consolidate.casting import KEEP
from bigtrain.checkpoint.consolidate.journal import Staging, check_output
from bigtrain.checkpoint.consolidate.layout import SAFETENSORS, index_json
from bigtrain.checkpoint.consolidate.naming import AUTO
from bigtrain.checkpoint.consolidate.plan import Plan, make_plan
from bigtrain.checkpoint.consolidate.removal import check_removable, removed
from bigtrain.checkpoint.consolidate.request import Request
from bigtrain.checkpoint.consolidate.side_files import CONFIG
from bigtrain.checkpoint.consolidate.summary import FileSummary, Moved, Summary
from bigtrain.checkpoint.consolidate.verification import check_source, read_back
from bigtrain.checkpoint.consolidate.workers import Copied, copy_all
from bigtrain.checkpoint.source import MODEL, open_source
from bigtrain.errors import CheckpointError


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
    return carry_out(
        Request(
            source=Path(source),
            output=Path(output),
            step=step,
            weights=weights,
            dtype=dtype,
            max_shard_size=max_shard_size,
            prefix=prefix,
            format=format,
            merge_adapter=merge_adapter,
            jobs=jobs,
            verify=verify,
            resume=resume,
            remove_source=remove_source,
            trust_times=trust_times,
            progress=progress,
        )
    )


def carry_out(request: Request) -> Summary:
    """Do what `consolidate` says."""
    started = time.monotonic()
    try:
        check_output(request.output)
        plan = make_plan(
            open_source(request.source, step=request.step, trust_times=request.trust_times), request
        )
        if request.remove_source:
            check_removable(plan)
        staging = Staging(
            request.output.resolve(), fingerprint=plan.fingerprint(), resume=request.resume
        )
    except OSError as fault:
        where = fault.filename or request.source
        raise CheckpointError(f"{where}: {fault.strerror or fault}") from fault
    with staging:
        copied = _filled(plan, staging)
        staging.commit()
    summary = _summarise(plan, staging.output, copied, seconds=time.monotonic() - started)
    return removed(plan, summary) if request.remove_source else summary


def _filled(plan: Plan, staging: Staging) -> Copied:
    """Everything but the rename."""
    try:
        staging.check_space(plan.nbytes + plan.side_bytes)
        copied = copy_all(plan, staging)
        if plan.request.is_verified:
            copied = copied._replace(checked=check_source(plan.source))
            read_back(plan.files, copied.files, staging.path)
        _write_small(plan, staging)
    except OSError as fault:
        where = fault.filename or staging.path
        raise CheckpointError(f"{where}: {fault.strerror or fault}") from fault
    return copied


def _write_small(plan: Plan, staging: Staging) -> None:
    """The rest of the directory, the index last."""
    for name, path in plan.side_files.items():
        (staging.path / name).parent.mkdir(exist_ok=True)
        if name != CONFIG:
            staging.copy_file(name, path)
    if CONFIG in plan.side_files:
        staging.write_file(CONFIG, json.dumps(plan.config, indent=2).encode() + b"\n")
    if len(plan.files) > 1:
        staging.write_file(plan.index_name, index_json(plan.files))


def _summarise(plan: Plan, output: Path, copied: Copied, *, seconds: float) -> Summary:
    overflowed: dict[str, int] = {}
    for file in copied.files:
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
            for f in copied.files
        ),
        side_files=tuple(sorted(plan.side_files)),
        seconds=seconds,
        source_checked=copied.checked,
        verified=plan.request.is_verified,
        source_removed=False,
        overflowed=overflowed,
        warnings=tuple(warnings),
    )
