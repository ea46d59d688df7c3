"""One process per node that imports once and gives birth to every rank.

It is single-threaded Python that does what the agent asks through a socket, in this order:
`preload` (once), then any number of `store`, `rank` and `forget`. A child is forked twice, so that
the agent (which adopts orphans) becomes its parent: exit codes and signals need no messenger.

When the agent dies, by whatever cause, the socket ends; the server then kills the process groups
of all that it gave birth to, data workers included, and leaves.

In the child, `main` simply goes on with the rank's program and returns from it, so the interpreter
ends as any other does: exit handlers run, threads are joined, buffers are flushed.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
import socket
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from bigtrain.cluster import events, linux, rank, wire

Program: TypeAlias = Callable[[], None]
"""What a child goes on with, once it has left the server's loop."""


def main() -> None:
    """Serve until the agent leaves; in a child, be the rank or the store."""
    agent, control = int(sys.argv[1]), socket.socket(fileno=int(sys.argv[2]))
    linux.die_with_parent()
    if os.getppid() != agent:
        return
    program = _Server(agent=agent, control=control).serve()
    if program is None:
        os._exit(0)  # nothing to flush, and taking torch's modules apart would hold up the agent
    program()


def interpreter_command(module: str, *arguments: str) -> list[str]:
    """The command of a fresh interpreter that calls `module.main()`.

    `-m` would put the working directory before the standard library while bigtrain is being
    imported; `sys.argv[1]` is the folder that holds bigtrain, and is taken out of the way.
    """
    code = (
        "import sys; safe = sys.flags.safe_path; "
        "sys.path[: not safe] = [sys.argv.pop(1)]; "
        f"from {module} import main; sys.path[:1] = [] if safe else ['']; main()"
    )
    return [sys.executable, "-c", code, rank.package_root(), *arguments]


class _Server:
    def __init__(self, *, agent: int, control: socket.socket) -> None:
        self._agent = agent
        self._control = control
        self._groups: set[int] = set()
        """Process groups of the children; the agent keeps their leaders unreaped meanwhile, so
        that a number here can't come to mean another process."""

    def serve(self) -> Program | None:
        """Returns the program in a child, and None in the server when the agent has left."""
        while True:
            try:
                request, files = wire.receive(self._control)
            except OSError:
                request, files = None, []
            if request is None:
                self._kill_all()
                return None
            program = self._handle(request, files)
            if program is not None:
                return program
            for file in files:
                os.close(file)

    def _handle(self, request: dict[str, Any], files: list[int]) -> Program | None:
        operation = request["operation"]
        if operation == "preload":
            self._preload(request)
            return None
        if operation == "forget":
            self._groups.clear()
            return None
        program: Program = (
            _rank_program(request, files) if operation == "rank" else _store_program(request, files)
        )
        return program if self._give_birth() else None

    def _preload(self, request: Mapping[str, Any]) -> None:
        rank.set_module_path(kind=request["kind"], source=request["source"])
        started = time.monotonic()
        gc.disable()  # nearly all that imports make stays: looking for garbage is a fifth of them
        skipped = _import_all(request["modules"])
        gc.freeze()  # the ranks share these objects' pages, and must not write to their headers
        gc.enable()
        linux.outlive_parent()
        reply = {
            "seconds": time.monotonic() - started,
            "threads": linux.num_threads(),
            "skipped": skipped,
            "refusal": _why_not_fork(request["modules"]),
        }
        self._tell(reply)

    def _give_birth(self) -> bool:
        """Fork a child of the agent. True in the child; False in the server, the agent told."""
        birth, birth_end = os.pipe()
        release_end, release = os.pipe()
        sys.stdout.flush()
        sys.stderr.flush()
        try:
            middle = _fork()
        except OSError as error:
            _close(birth, birth_end, release_end, release)
            self._tell({"error": f"can't fork: {error}"})
            return False
        if middle == 0:
            _close(birth, release)
            _leave_a_child()
            self._be_born(birth_end, release_end)
            return True
        _close(birth_end, release_end)
        self._register(middle, birth, release)
        return False

    def _register(self, middle: int, birth: int, release: int) -> None:
        """The server's side: wait until the child is the agent's, then let it go on."""
        text = os.read(birth, 32)
        os.waitpid(middle, 0)
        if text:
            self._groups.add(int(text))
            self._tell({"pid": int(text)})
            with contextlib.suppress(BrokenPipeError):  # killed already
                os.write(release, b"\n")
        else:
            self._tell({"error": "can't fork: the system allows no more processes"})
        _close(birth, release)

    def _be_born(self, birth_end: int, release_end: int) -> None:
        """The child's side. It may ask to die with its parent only once that is the agent: until
        the release its parent is a process that is about to leave."""
        self._control.close()
        os.setpgid(0, 0)
        os.write(birth_end, str(os.getpid()).encode())
        released = os.read(release_end, 1)
        _close(birth_end, release_end)
        linux.die_with_parent()
        if not released or os.getppid() != self._agent:
            os._exit(1)

    def _tell(self, message: Mapping[str, Any]) -> None:
        with contextlib.suppress(OSError):  # the agent is gone, as the next `receive` will say
            wire.send(self._control, message)

    def _kill_all(self) -> None:
        for group in self._groups:
            linux.kill_group(group)


def _rank_program(request: Mapping[str, Any], files: list[int]) -> Program:
    """Files: the log, the event pipe's end."""
    job = rank.RankJob.from_json(request["job"])

    def program() -> None:
        log, event_pipe = files
        _redirect(log)
        pipe = {events.EVENT_VARIABLE: events.describe_pipe(event_pipe)}
        environment = {**request["environment"], **pipe}
        if request["fresh"]:
            os.set_inheritable(event_pipe, True)
            command = interpreter_command("bigtrain.cluster.rank", request["job"])
            os.execve(command[0], command, {**os.environ, **environment})
        rank.reset_process(environment)
        rank.run(job)

    return program


def _store_program(request: Mapping[str, Any], files: list[int]) -> Program:
    """Files: the log, the listening socket, a pipe that ends when the store is to leave."""

    def program() -> None:
        from bigtrain.cluster import store

        log, listener, life = files
        _redirect(log)
        store.serve(host=request["host"], port=request["port"], listener=listener, life=life)

    return program


def _redirect(log: int) -> None:
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.dup2(log, 1)
    os.dup2(log, 2)
    _close(nothing, log)


def _import_all(modules: list[str]) -> dict[str, str]:
    """Import what can be imported; module → why not.

    A module that fails is left to the ranks: a script may expect it to be missing, and if not,
    its own traceback tells better than ours.
    """
    skipped = {}
    for name in modules:
        try:
            importlib.import_module(name)
        except (Exception, SystemExit) as error:
            skipped[name] = f"{type(error).__qualname__}: {error}"
    return skipped


def _why_not_fork(modules: list[str]) -> str | None:
    if linux.cuda_is_initialized():
        return (
            f"importing {', '.join(modules)} initialised CUDA, and no process that is forked "
            "after that can use a GPU; start with --start fresh"
        )
    return None


def _fork() -> int:
    with warnings.catch_warnings():
        # Python 3.12 warns of every fork beside threads. Those here belong to numerical
        # libraries, which restart them in the child; no Python thread runs in the server.
        warnings.simplefilter("ignore", DeprecationWarning)
        return os.fork()


def _leave_a_child() -> None:
    """In the process between server and rank: fork the rank and leave. Returns in the rank."""
    try:
        pid = _fork()
    except OSError:
        os._exit(1)
    if pid > 0:
        os._exit(0)


def _close(*files: int) -> None:
    for file in files:
        os.close(file)
