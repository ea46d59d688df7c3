"""The agent's side of the fork server: start it, ask it, end it."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bigtrain.cluster import failure, fork_server, wire
from bigtrain.cluster.rank import RankJob
from bigtrain.errors import LaunchError

_REPLY_TIMEOUT_S = 60.0
"""A fork takes milliseconds; a machine that swaps may need far longer, a dead one for ever."""


@dataclass(frozen=True, kw_only=True)
class Preloaded:
    """What the server has to say when it is ready."""

    seconds: float
    threads: int
    skipped: Mapping[str, str]


class ForkServer:
    """A server process on this node. `preload` was asked for when this returns; wait for
    `control` to become readable, then call `ready`."""

    def __init__(
        self,
        *,
        environment: Mapping[str, str],
        working_dir: str,
        log: Path,
        kind: str,
        source: str,
        modules: Sequence[str],
    ) -> None:
        self._log = log
        self.control, theirs = wire.connected_pair()
        with theirs, log.open("ab") as output:
            self._process = subprocess.Popen(
                fork_server.interpreter_command(
                    "bigtrain.cluster.fork_server", str(os.getpid()), str(theirs.fileno())
                ),
                env=dict(environment),
                cwd=working_dir,
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,  # a Ctrl-C at the terminal is the agent's to pass on
            )
        self.pid = self._process.pid
        self._ask(
            {"operation": "preload", "kind": kind, "source": source, "modules": list(modules)}
        )

    def ready(self) -> Preloaded:
        """Read the answer to the preload. LaunchError if it died or must not fork."""
        reply = self._reply()
        if reply["refusal"]:
            raise LaunchError(reply["refusal"])
        return Preloaded(
            seconds=reply["seconds"], threads=reply["threads"], skipped=reply["skipped"]
        )

    def start_rank(
        self, job: RankJob, *, environment: Mapping[str, str], fresh: bool, files: Sequence[int]
    ) -> int:
        """The pid of a new rank, which is this process's own child. `files`: log, event pipe."""
        request = {
            "operation": "rank",
            "job": job.to_json(),
            "environment": dict(environment),
            "fresh": fresh,
        }
        return self._birth(request, files)

    def start_store(self, *, host: str, port: int, files: Sequence[int]) -> int:
        """The pid of a new store. `files`: log, listening socket, life pipe."""
        return self._birth({"operation": "store", "host": host, "port": port}, files)

    def forget_children(self) -> None:
        """All children so far have been reaped: their numbers may come to mean others."""
        with contextlib.suppress(OSError):  # a server that is gone remembers nothing
            wire.send(self.control, {"operation": "forget"})

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def close(self) -> None:
        """End the server, and with it whatever it gave birth to. Safe to call twice."""
        self.control.close()
        try:
            self._process.wait(timeout=1.0)
        except subprocess.TimeoutExpired:  # in the middle of an import
            self._process.kill()
            self._process.wait()

    def _birth(self, request: Mapping[str, Any], files: Sequence[int]) -> int:
        self._ask(request, files)
        reply = self._reply()
        if "error" in reply:
            raise LaunchError(f"a process could not be started: {reply['error']}")
        return int(reply["pid"])

    def _ask(self, request: Mapping[str, Any], files: Sequence[int] = ()) -> None:
        try:
            wire.send(self.control, request, files)
        except OSError as error:
            raise self._death() from error

    def _reply(self) -> dict[str, Any]:
        self.control.settimeout(_REPLY_TIMEOUT_S)
        try:
            reply, _ = wire.receive(self.control)
        except TimeoutError:
            raise LaunchError(
                f"the fork server (pid {self.pid}) has not answered for {_REPLY_TIMEOUT_S:.0f} s; "
                f"its log: {self._log}"
            ) from None
        except OSError:
            reply = None
        if reply is None:
            raise self._death()
        return reply

    def _death(self) -> LaunchError:
        try:
            code = self._process.wait(timeout=5.0)
        except subprocess.TimeoutExpired:
            self._process.kill()
            code = self._process.wait()
        how = f"exit code {code}" if code >= 0 else failure.signal_name(-code)
        lines = [f"the process that starts the ranks died ({how})"]
        lines += [f"  {line}" for line in failure.log_tail(self._log)]
        return LaunchError("\n".join([*lines, f"its log: {self._log}"]))
