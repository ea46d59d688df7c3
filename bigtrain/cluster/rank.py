"""What a rank does between its birth and the user's first line, and at its end.

A rank is born by a fork of the server, or as a fresh interpreter (`main`, below). Either way it
then is, for all that the code it runs can tell, the process that `python script.py` starts: its
own `__main__`, arguments, module path, signals, threads, exit code and exit handlers.
"""

from __future__ import annotations

import atexit
import io
import json
import os
import random
import signal
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType, TracebackType

from bigtrain.cluster import accelerate_on_cpu, events, failure
from bigtrain.errors import BigtrainError

_RUN_FILE_MODULE = "bigtrain.worker"


@dataclass(frozen=True, kw_only=True)
class RankJob:
    """What one rank is to run, and where it reports."""

    rank: int
    host: str
    kind: str
    """`script`: `source` with `script_args`; `run_file`: the worker, which reads the plan."""
    source: str
    script_args: tuple[str, ...]
    error_path: str

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> RankJob:
        values = json.loads(text)
        return cls(**{**values, "script_args": tuple(values["script_args"])})


def main() -> None:
    """A fresh interpreter goes on as the rank that its one argument describes."""
    job = RankJob.from_json(sys.argv[1])
    set_module_path(kind=job.kind, source=job.source)
    number, _, _ = os.environ[events.EVENT_VARIABLE].partition(":")
    os.set_inheritable(int(number), False)
    run(job)


def run(job: RankJob) -> None:
    """Go on as the main program of `job`; returns, raises or exits as that program does.

    An exception is recorded, shown by whatever hook the program has installed, and passed on.
    """
    _flush_every_line()
    try:
        _run_main_program(job)
    except BigtrainError as error:
        _announce(error, job)
        sys.stderr.write(f"{error}\n")
        raise SystemExit(error.exit_code) from None
    except SystemExit:
        raise
    except BaseException as error:
        if not isinstance(error, KeyboardInterrupt):
            _announce(error, job)
        _show(error)
        raise


def set_module_path(*, kind: str, source: str) -> None:
    """Make `sys.path` start as `python script.py` has it, or without any folder for the worker.

    The interpreter put the working directory first, where a user's `random.py` would replace the
    standard library's. bigtrain's own place goes last, where it hides nothing.
    """
    if not sys.flags.safe_path:
        sys.path[:1] = [str(Path(source).resolve().parent)] if kind == "script" else []
    home = package_root()
    if home not in sys.path:
        sys.path.append(home)


def package_root() -> str:
    """The folder from which `import bigtrain` finds this very package."""
    return str(Path(__file__).resolve().parents[2])


def reset_process(environment: Mapping[str, str]) -> None:
    """Undo in a forked rank what it inherited from the server and a new process would not have."""
    os.environ.update(environment)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGCHLD):
        signal.signal(number, signal.SIG_DFL)
    _forget_resource_tracker()
    _reseed()


def _reseed() -> None:
    """Random numbers differ between ranks, as they do between processes."""
    random.seed()
    numpy_random = sys.modules.get("numpy.random")
    if numpy_random is not None:
        numpy_random.seed()
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.default_generator.seed()  # a GPU's generators are made later, in the rank


def _forget_resource_tracker() -> None:
    """multiprocessing's tracker, if the preload started it, is the server's child, not ours."""
    module = sys.modules.get("multiprocessing.resource_tracker")
    tracker = getattr(module, "_resource_tracker", None)
    if tracker is None or tracker._fd is None:
        return
    os.close(tracker._fd)
    tracker._fd = tracker._pid = None


def _run_main_program(job: RankJob) -> None:
    if job.kind == "script":
        _run_script(job)
        return
    sys.argv[:] = [_RUN_FILE_MODULE]
    _install_main(ModuleType("__main__"))
    from bigtrain import worker

    sys.exit(worker.main())


def _run_script(job: RankJob) -> None:
    accelerate_on_cpu.install(os.environ)
    sys.argv[:] = [job.source, *job.script_args]
    sys.orig_argv[:] = [sys.executable, *sys.argv]
    module = ModuleType("__main__")
    module.__file__ = job.source
    module.__loader__ = SourceFileLoader("__main__", job.source)
    module.__dict__["__cached__"] = None
    _install_main(module)
    with io.open_code(job.source) as file:
        code = compile(file.read(), job.source, "exec", dont_inherit=True)
    atexit.register(_leave_process_group)  # before the program's own handlers, so that it runs last
    try:
        exec(code, module.__dict__)
    except SystemExit as end:
        if end.code:
            atexit.unregister(_leave_process_group)
        raise
    except BaseException:
        # A group whose other members may be waiting is not left in good order.
        atexit.unregister(_leave_process_group)
        raise


def _leave_process_group() -> None:
    """Many scripts never do: gloo's threads then abort a process that has ended well."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


def _install_main(module: ModuleType) -> None:
    """Classes that the program defines are pickled as `__main__.Name`, and must be found there."""
    module.__dict__["__builtins__"] = sys.modules["builtins"]
    if "__annotations__" in vars(sys.modules["__main__"]):  # until Python 3.13
        module.__annotations__ = {}
    sys.modules["__main__"] = module
    if "__mp_main__" in sys.modules:  # multiprocessing's alias, made when it is imported
        sys.modules["__mp_main__"] = module


def _announce(error: BaseException, job: RankJob) -> None:
    failure.record(error, path=Path(job.error_path), rank=job.rank, host=job.host)
    events.emit("failed")


def _show(error: BaseException) -> None:
    """Print the traceback now, while it does not have the launcher's frames at its start.

    Passing the error on gives those frames back, so that the interpreter must not print it again;
    it still runs the exit handlers and chooses the exit code.
    """
    shown = error.with_traceback(failure.own_frames(error.__traceback__))
    try:
        sys.excepthook(type(shown), shown, shown.__traceback__)
    except Exception:  # a faulty hook of the program's own
        sys.__excepthook__(type(shown), shown, shown.__traceback__)
    sys.excepthook = _show_nothing


def _show_nothing(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    """The exception was shown already."""


def _flush_every_line() -> None:
    """Output goes to a log that a person may be reading: whole lines, as soon as they are."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)
