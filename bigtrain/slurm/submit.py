"""From a plan to a job in the queue, in the time that sbatch itself takes."""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bigtrain.cluster.rank import package_root
from bigtrain.errors import ConfigError, LaunchError
from bigtrain.plan import RunPlan, write_plan
from bigtrain.planning.output_dir import plan_path
from bigtrain.sections import ClusterSection
from bigtrain.share import bundled_file
from bigtrain.slurm import client
from bigtrain.slurm.partition import survey
from bigtrain.slurm.provenance import (
    CodeState,
    hash_file,
    read_code_state,
    read_diff,
    take_snapshot,
)
from bigtrain.slurm.record import SubmissionRecord, record_path, remember
from bigtrain.slurm.script import JobRequest, render, sbatch_flags
from bigtrain.slurm.settings import SlurmSettings, read_settings

_DEFAULT_TEMPLATE = "train.sbatch"


@dataclass(frozen=True, kw_only=True)
class Submission:
    """A job that Slurm has taken."""

    job_id: str
    script: Path
    log: str
    """Where the job's own output goes; `%j` stands for its number."""


def describe(plans: RunPlan | Sequence[RunPlan], *, settings: SlurmSettings) -> str:
    """The batch script that `submit` would hand over, and nothing else happens."""
    return _rendered(_request(_several(plans), settings))


def submit(
    plans: RunPlan | Sequence[RunPlan],
    *,
    settings: SlurmSettings,
    environment: Mapping[str, str],
) -> Submission:
    """Write the plans, the script and its record, and queue the job; several plans as an array.

    The plans of a sweep differ in what they train and where they write, not in their shape.
    `environment` is the caller's own: the job inherits it, and secrets with it, through Slurm.
    """
    plans = _several(plans)
    source, code = plans[0], _code_of(plans[0])
    snapshot: Path | None = None
    if settings.snapshot:
        snapshot = Path(source.output_dir) / "code" / f"attempt-{source.attempt:02d}"
        plans = tuple(take_snapshot(plan, snapshot)[0] for plan in plans)
    request = _request(plans, settings, package_root=_moved_package(code, snapshot))
    text = _rendered(request)
    for plan, path in zip(request.plans, request.plan_paths, strict=True):
        write_plan(plan, path)  # first: it claims the attempt
    script = _write_script(request, text)
    record = _record(request, script, code, snapshot)
    paths = [record_path(plan.output_dir, plan.attempt) for plan in plans]
    _write_records(record, paths)
    try:
        job_id = _queue(script, sbatch_flags(request), cwd=Path(source.working_dir))
    except LaunchError:
        _withdraw([*request.plan_paths, *paths, script, script.with_suffix(".diff")], snapshot)
        raise
    record = dataclasses.replace(record, job_id=job_id)
    _write_records(record, paths)
    remember(record, paths[0], environment=environment)
    log = settings.options.get("output") or str(request.log)
    number = log.replace("%j", job_id).replace("%A", job_id)
    return Submission(job_id=job_id, script=script, log=number)


def _write_records(record: SubmissionRecord, paths: Sequence[Path]) -> None:
    """Every run of a sweep finds its own, which says what all of them were made of."""
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        record.write(path)


def _withdraw(files: Sequence[Path], snapshot: Path | None) -> None:
    """A job that Slurm did not take was no attempt, and leaves none."""
    for path in files:
        path.unlink(missing_ok=True)
    if snapshot is not None:
        shutil.rmtree(snapshot, ignore_errors=True)
    for folder in {path.parent for path in files}:
        with contextlib.suppress(OSError):  # others' files are in it
            folder.rmdir()


def gpus_of_nodes(cluster: ClusterSection) -> int:
    """GPUs that each node of the job will have: as asked for, or one for every process.

    None of them if the partition's nodes have none. This machine's own are not looked at.
    """
    settings = read_settings(cluster.slurm)
    if settings.gpus_per_node is not None:
        return settings.gpus_per_node
    shape = survey(settings.options.get("partition"))
    return 0 if shape is not None and shape.gpus == 0 else cluster.procs_per_node or 0


def _several(plans: RunPlan | Sequence[RunPlan]) -> tuple[RunPlan, ...]:
    several = (plans,) if isinstance(plans, RunPlan) else tuple(plans)
    places = [plan.output_dir for plan in several]
    if len(set(places)) != len(places):
        raise ConfigError("two runs of the sweep have the same output_dir; give each its own")
    return several


def _request(
    plans: tuple[RunPlan, ...], settings: SlurmSettings, *, package_root: str | None = None
) -> JobRequest:
    topology = plans[0].topology
    if plans[0].max_restarts:
        raise ConfigError(
            "max_restarts restarts ranks on one machine, and a Slurm job starts again as a whole; "
            "use cluster.slurm.max_requeues"
        )
    if settings.spare_nodes and plans[0].training.get("save_on_each_node"):
        raise ConfigError(
            "cluster.slurm.spare_nodes: a spare node has no part of a checkpoint that each node "
            "keeps on its own disk (training.save_on_each_node); leave out one of the two"
        )
    return JobRequest(
        plans=plans,
        plan_paths=tuple(plan_path(plan) for plan in plans),
        settings=settings,
        cpus_per_task=_share_of_cpus(settings, topology.procs_per_node, device=plans[0].device),
        package_root=package_root,
        last_save_s=last_save_s(Path(plans[0].output_dir)),
    )


def last_save_s(output_dir: Path) -> float | None:
    """How long the newest checkpoint took to write: from its first whole file to its manifest."""
    manifests = [(p.stat().st_mtime, p) for p in output_dir.glob("checkpoint-*/manifest.json")]
    if not manifests:
        return None
    committed, manifest = max(manifests)
    files = (path for path in manifest.parent.rglob("*") if path.is_file())
    return max(0.0, committed - min(path.stat().st_mtime for path in files))


def _share_of_cpus(settings: SlurmSettings, procs: int, *, device: str) -> int | None:
    if "cpus-per-task" in settings.options or "cpus-per-gpu" in settings.options:
        return None
    shape = survey(settings.options.get("partition"))
    if shape is None:
        return None
    return shape.share(procs) if device == "cuda" else shape.cpus


def _rendered(request: JobRequest) -> str:
    name = request.settings.template
    path = Path(name) if name and Path(name).is_file() else bundled_file(name or _DEFAULT_TEMPLATE)
    return render(request, template=path.read_text(encoding="utf-8"))


def _write_script(request: JobRequest, text: str) -> Path:
    path = record_path(request.plan.output_dir, request.plan.attempt).with_suffix(".sbatch")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def _code_of(plan: RunPlan) -> CodeState | None:
    return read_code_state(Path(plan.working_dir))


def _moved_package(code: CodeState | None, snapshot: Path | None) -> str | None:
    """bigtrain's own place in the snapshot, where the work tree is bigtrain's."""
    is_own = snapshot is not None and code is not None and Path(code.root) == Path(package_root())
    return str(snapshot) if is_own else None


def _record(
    request: JobRequest, script: Path, code: CodeState | None, snapshot: Path | None
) -> SubmissionRecord:
    plan = request.plan
    sweep = [(plan.name, plan.output_dir) for plan in request.plans]
    if code is not None:
        script.with_suffix(".diff").write_text(
            read_diff(code), encoding="utf-8", errors="surrogateescape"
        )
    return SubmissionRecord(
        name=request.name,
        output_dir=plan.output_dir,
        script=str(script),
        script_sha256=hash_file(script),
        source=plan.source,
        source_sha256=hash_file(Path(plan.source)),
        code=code,
        snapshot=None if snapshot is None else str(snapshot),
        nodes=plan.topology.nodes,
        submitted=time.time(),
        sweep=tuple(sweep) if len(sweep) > 1 else (),
    )


def _queue(script: Path, flags: Sequence[str], *, cwd: Path) -> str:
    # `--parsable` prints the number alone, with `;cluster` behind it where there are several.
    job_id = client.call(["sbatch", "--parsable", *flags, str(script)], cwd=cwd)
    job_id = job_id.strip().split(";")[0]
    if not job_id.isdigit():
        raise LaunchError(f"sbatch took {script}, but gave no job number: {job_id!r}")
    return job_id
