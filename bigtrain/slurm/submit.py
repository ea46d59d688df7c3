"""From a plan to a job in the queue, in the time that sbatch itself takes."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bigtrain.cluster.rank import package_root
from bigtrain.cluster.time_limit import last_save_s
from bigtrain.errors import BigtrainError, ConfigError, LaunchError
from bigtrain.plan import RunPlan, write_plan
from bigtrain.planning.output_dir import plan_path
from bigtrain.sections import ClusterSection
from bigtrain.share import bundled_file
from bigtrain.slurm import client
from bigtrain.slurm.client import Answer, NoAnswerError
from bigtrain.slurm.partition import Survey, partition_names
from bigtrain.slurm.provenance import CodeState, hash_file, read_code_state, read_diff
from bigtrain.slurm.record import SubmissionRecord, record_path, remember
from bigtrain.slurm.script import JobRequest, render, sbatch_flags, sbatch_options
from bigtrain.slurm.settings import SlurmSettings, read_settings
from bigtrain.slurm.snapshot import Snapshot

_TEMPLATES = ("train.sbatch", "apptainer.sbatch")
"""Those that are bundled; the first is the default."""
_LARGE_SNAPSHOT_BYTES = 1 << 30


@dataclass(frozen=True, kw_only=True)
class Submission:
    """A job that Slurm has taken."""

    job_id: str
    script: Path
    log: str
    """Where the job's own output goes."""
    notes: tuple[str, ...] = ()
    """What else the user should know."""


def describe(
    plans: RunPlan | Sequence[RunPlan], *, settings: SlurmSettings, survey: Survey | None = None
) -> str:
    """The batch script that `submit` would hand over, and nothing else happens."""
    plans = _several(plans)
    snapshot = Snapshot.of(plans[0], _code_state(plans)) if settings.snapshot else None
    return _rendered(_request(plans, settings, survey or Survey(), snapshot=snapshot))


def submit(
    plans: RunPlan | Sequence[RunPlan],
    *,
    settings: SlurmSettings,
    environment: Mapping[str, str],
    survey: Survey | None = None,
) -> Submission:
    """Write the plans, the script and its record, and queue the job; several plans as an array.

    The plans of a sweep differ in what they train and where they write, not in their shape.
    `survey`: what is known of the partitions already.
    `environment` is the caller's own: the job inherits it, and secrets with it, through Slurm.
    """
    plans = _several(plans)
    survey = survey or Survey()
    cwd, code = Path(plans[0].working_dir), _code_state(plans)
    snapshot = Snapshot.of(plans[0], code) if settings.snapshot else None
    request = _request(plans, settings, survey, snapshot=snapshot)
    text = _rendered(request)
    claimed: list[RunPlan] = []
    try:
        record, notes = _write(request, text, code=code, snapshot=snapshot, claimed=claimed)
        notes += [*_jobs_in_the_way(request), *_too_many_nodes(request, survey)]
        answer = _queue(Path(record.script), request, cwd=cwd)
    except NoAnswerError as error:  # all is left as it is: the job may be in the queue
        raise LaunchError(
            f"{error}\nthe job may have been taken all the same: squeue --me"
        ) from None
    except (OSError, BigtrainError) as error:
        _withdraw(claimed, snapshot)
        if isinstance(error, BigtrainError):
            raise
        raise LaunchError(f"nothing was submitted: {error}; give another --output-dir") from None
    notes += answer.remarks
    return _taken(request, record, answer.printed.strip(), notes=notes, environment=environment)


def _write(
    request: JobRequest,
    text: str,
    *,
    code: CodeState | None,
    snapshot: Snapshot | None,
    claimed: list[RunPlan],
) -> tuple[SubmissionRecord, list[str]]:
    """All files of the job, but for its number; and what is to be said of them.

    The runs whose attempt is taken by then are put into `claimed`.
    """
    for plan, path in zip(request.plans, request.plan_paths, strict=True):
        write_plan(plan, path)
        claimed.append(plan)
    notes = []
    if snapshot is not None:
        size = snapshot.take()
        if size > _LARGE_SNAPSHOT_BYTES:
            notes.append(
                f"the snapshot has {size / 2**30:.1f} GiB ({snapshot.target}); what .gitignore "
                "names is linked instead of copied"
            )
    script = _write_script(request, text)
    record = _record(request, script, code, snapshot)
    _write_records(record, request.plans)
    return record, notes


def _taken(
    request: JobRequest,
    record: SubmissionRecord,
    printed: str,
    *,
    notes: list[str],
    environment: Mapping[str, str],
) -> Submission:
    """The job is in the queue: whatever fails now, its number must be told."""
    job_id, _, cluster = printed.partition(";")
    if not job_id.isdigit():
        raise LaunchError(f"sbatch took {record.script}, but gave no job number: {printed!r}")
    record = dataclasses.replace(record, job_id=job_id, cluster=cluster or None)
    try:
        _write_records(record, request.plans)
        path = record_path(request.plan.output_dir, request.plan.attempt)
        remember(record, path, environment=environment)
    except (OSError, RuntimeError) as error:  # RuntimeError: there is no home directory
        notes = [
            *notes,
            f"bigtrain jobs and cancel will not know the job ({error}); use squeue and scancel",
        ]
    log = sbatch_options(request).get("output") or "slurm-%j.out"
    return Submission(
        job_id=job_id,
        script=Path(record.script),
        log=log.replace("%j", job_id).replace("%A", job_id),
        notes=tuple(notes),
    )


def _write_records(record: SubmissionRecord, plans: Sequence[RunPlan]) -> None:
    """Every run of a sweep finds its own, which says what all of them were made of."""
    for plan in plans:
        path = record_path(plan.output_dir, plan.attempt)
        path.parent.mkdir(parents=True, exist_ok=True)
        record.write(path)


def _withdraw(plans: Sequence[RunPlan], snapshot: Snapshot | None) -> None:
    """A job that Slurm did not take was no attempt, and leaves none."""
    records = [record_path(plan.output_dir, plan.attempt) for plan in plans]
    files = [plan_path(plan) for plan in plans]
    files += [path.with_suffix(end) for path in records for end in (".json", ".sbatch", ".diff")]
    folders = dict.fromkeys(path.parent for path in files)
    if snapshot is not None and plans:
        shutil.rmtree(snapshot.target, ignore_errors=True)
        folders[snapshot.target.parent] = None
    with contextlib.suppress(OSError):
        for path in files:
            path.unlink(missing_ok=True)
    for folder in (*folders, *(Path(plan.output_dir) for plan in plans)):
        with contextlib.suppress(OSError):  # others' files are in it
            folder.rmdir()


def gpus_of_nodes(cluster: ClusterSection, *, survey: Survey) -> int:
    """GPUs that each node of the job will have: as asked for, or one for every process.

    None of them if none of the partition's nodes has any; where only some have, the job is given
    those. This machine's own are not looked at.
    """
    try:
        settings = read_settings(cluster.slurm)
    except ConfigError:
        return cluster.procs_per_node or 0  # it is told where the section itself is read
    if settings.gpus_per_node is not None:
        return settings.gpus_per_node
    partition = survey.partition(settings.options.get("partition"))
    return 0 if partition is not None and not partition.has_gpus else cluster.procs_per_node or 0


def _code_state(plans: Sequence[RunPlan]) -> CodeState | None:
    outputs = [Path(os.path.commonpath([plan.output_dir for plan in plans]))]
    return read_code_state(Path(plans[0].working_dir), outputs=outputs)


def _several(plans: RunPlan | Sequence[RunPlan]) -> tuple[RunPlan, ...]:
    several = (plans,) if isinstance(plans, RunPlan) else tuple(plans)
    places = [plan.output_dir for plan in several]
    if len(set(places)) != len(places):
        raise ConfigError("two runs of the sweep have the same output_dir; give each its own")
    return several


def _request(
    plans: tuple[RunPlan, ...],
    settings: SlurmSettings,
    survey: Survey,
    *,
    snapshot: Snapshot | None,
) -> JobRequest:
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
    if snapshot is not None:
        plans = tuple(snapshot.moved(plan) for plan in plans)
    return JobRequest(
        plans=plans,
        plan_paths=tuple(plan_path(plan) for plan in plans),
        settings=settings,
        cpus_per_task=_share_of_cpus(settings, _gpus_of_node(plans[0]), survey),
        package_root=_moved_package(snapshot),
        last_save_s=last_save_s(Path(plans[0].output_dir)),
    )


def _share_of_cpus(settings: SlurmSettings, gpus: int, survey: Survey) -> int | None:
    """CPUs of a node for a task with `gpus` GPUs."""
    if "cpus-per-task" in settings.options or "cpus-per-gpu" in settings.options:
        return None
    partition = survey.partition(settings.options.get("partition"))
    return None if partition is None else partition.cpus(gpus)


def _gpus_of_node(plan: RunPlan) -> int:
    return plan.topology.procs_per_node if plan.device == "cuda" else 0


def _too_many_nodes(request: JobRequest, survey: Survey) -> list[str]:
    """sbatch takes a job for more nodes than there are: it waits for ever."""
    partition = survey.partition(request.settings.options.get("partition"))
    asked = request.plan.topology.nodes + request.settings.spare_nodes
    gpus = _gpus_of_node(request.plan)
    if partition is None or asked <= (there := partition.nodes(gpus)):
        return []
    kind = f" with {gpus} GPUs or more" if gpus else ""
    asked_for = f"the job asks for {asked} nodes"
    return [f"{asked_for}, and its partition has {there}{kind}: it may never start"]


def _rendered(request: JobRequest) -> str:
    name = request.settings.template
    path = Path(name) if name and Path(name).is_file() else _bundled_template(name)
    try:
        text = path.read_bytes().decode().replace("\r\n", "\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cluster.slurm.template: {path} can't be read: {error}") from None
    return render(request, template=text)


def _bundled_template(name: str | None) -> Path:
    if name is not None and Path(name).name not in _TEMPLATES:
        raise ConfigError(
            f"cluster.slurm.template: {name} is no file, and no template of bigtrain's; those are "
            f"{' and '.join(_TEMPLATES)}"
        )
    return bundled_file(name or _TEMPLATES[0])


def _write_script(request: JobRequest, text: str) -> Path:
    path = record_path(request.plan.output_dir, request.plan.attempt).with_suffix(".sbatch")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8", errors="surrogateescape")
    return path


def _moved_package(snapshot: Snapshot | None) -> str | None:
    """bigtrain's own place in the snapshot, where the work tree is bigtrain's."""
    is_own = snapshot is not None and snapshot.root == Path(package_root())
    return str(snapshot.target) if snapshot is not None and is_own else None


def _record(
    request: JobRequest, script: Path, code: CodeState | None, snapshot: Snapshot | None
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
        snapshot=None if snapshot is None else str(snapshot.target),
        nodes=plan.topology.nodes,
        submitted=time.time(),
        sweep=tuple(sweep) if len(sweep) > 1 else (),
    )


def _queue(script: Path, request: JobRequest, *, cwd: Path) -> Answer:
    """sbatch's: the job's number, and `;cluster` behind it where it was told of one."""
    command = ["sbatch", "--parsable", *sbatch_flags(request), str(script)]
    try:
        return client.ask(command, cwd=cwd)
    except NoAnswerError:
        raise
    except LaunchError as error:
        asked, known = request.settings.options.get("partition"), partition_names()
        if asked is None or not known or set(asked.split(",")) <= set(known.split(", ")):
            raise
        raise LaunchError(f"{error}\nthere is no partition {asked}; there are {known}") from None


def _jobs_in_the_way(request: JobRequest) -> list[str]:
    """An earlier job of the same run that has not ended: only one at a time can write there."""
    if "dependency" in request.settings.options:
        return []
    folder = record_path(request.plan.output_dir, request.plan.attempt).parent
    earlier = [SubmissionRecord.read(path) for path in sorted(folder.glob("attempt-*.json"))]
    numbers = [record.job_id for record in earlier if record and record.job_id]
    for number in numbers[-1:]:
        with contextlib.suppress(LaunchError):
            state = client.call(["squeue", "--noheader", "--format=%T", f"--jobs={number}"])
            if state.strip():
                return [
                    f"job {number} ({state.split()[0]}) writes to the same output_dir; while it "
                    f"runs this one can't (--sbatch dependency=afterany:{number} makes it wait)"
                ]
    return []
