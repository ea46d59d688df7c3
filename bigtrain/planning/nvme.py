"""State that DeepSpeed keeps on NVMe: who can have it, and what a machine needs for it.

DeepSpeed reads and writes it by an operator that it compiles against libaio when the run starts
(deepspeed/ops/op_builder/async_io.py); what is missing for that is told before anything starts.
"""

from __future__ import annotations

import importlib.util
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from bigtrain.errors import UnsupportedError
from bigtrain.plan import RunPlan
from bigtrain.translate.config import unsaved, uses_nvme

_PROGRAM = "#include <libaio.h>\nint main() { return io_submit(nullptr, 0, nullptr); }\n"
_PATIENCE_S = 60
_MENDING = (
    "install libaio-dev (Debian, Ubuntu) or libaio-devel (Fedora, RHEL), or say in CFLAGS and "
    "LDFLAGS where it lies; or offload to cpu"
)


def refusals(plan: RunPlan) -> Iterator[str]:
    """Why a launch of this plan is refused, whatever the machine."""
    if plan.kind != "run_file":
        return
    if why := unsaved(plan.engine):
        yield (
            f"engine: a run file's checkpoints can't hold {why}, so it is planned and not started: "
            "offload all of it to cpu, or use a script with transformers' Trainer, whose "
            "checkpoints are DeepSpeed's own"
        )


def refuse(plan: RunPlan, environment: Mapping[str, str], *, is_elsewhere: bool) -> None:
    """UnsupportedError with all that stands against a start. `is_elsewhere`: on other machines."""
    found = [*refusals(plan)]
    is_here = uses_nvme(plan.engine) and not found and not is_elsewhere
    if is_here and (why := lacking(environment)):
        found.append(f"engine: offload to nvme: {why}; {_MENDING}")
    if found:
        raise UnsupportedError(found)


def lacking(environment: Mapping[str, str]) -> str:
    """What DeepSpeed can't build its operator without; empty where there is all, or it is built."""
    spec = importlib.util.find_spec("deepspeed")
    if spec is None or spec.origin is None or list(_prebuilt(Path(spec.origin).parent)):
        return ""
    name = environment.get("CXX") or "c++"
    compiler = shutil.which(name, path=environment.get("PATH"))
    if compiler is None:
        return f"DeepSpeed compiles an operator for it, and there is no compiler ({name})"
    if not _links(compiler, environment):
        return "DeepSpeed compiles an operator for it against libaio, which was not found here"
    return ""


def _prebuilt(deepspeed: Path) -> Iterator[Path]:
    """Of an installation that was made with DS_BUILD_AIO=1."""
    yield from deepspeed.glob("ops/aio/async_io_op*.so")


def _links(compiler: str, environment: Mapping[str, str]) -> bool:
    before = shlex.split(environment.get("CFLAGS", ""))
    after = shlex.split(environment.get("LDFLAGS", ""))
    with tempfile.TemporaryDirectory() as folder:
        command = [compiler, *before, "-x", "c++", "-", "-o", f"{folder}/linked", *after, "-laio"]
        try:
            done = subprocess.run(
                command,
                input=_PROGRAM,
                text=True,
                capture_output=True,
                env=dict(environment),
                timeout=_PATIENCE_S,
                check=False,
            )
        except (OSError, subprocess.TimeoutExpired):
            return False
    return done.returncode == 0
