"""Real launches: the agent in a process of its own, with real forks, signals and gloo."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

_DRIVE = Path(__file__).with_name("drive.py")
_ROOT = Path(__file__).parents[2]
_GLOO = ("torch", "torch.distributed")


class Launched:
    """A launch that is under way or over."""

    def __init__(self, process: subprocess.Popen[str], output_dir: Path) -> None:
        self.process = process
        self.output_dir = output_dir
        self.code: int | None = None
        self.out = self.err = ""

    def wait(self, timeout_s: float = 90.0) -> Launched:
        self.out, self.err = self.process.communicate(timeout=timeout_s)
        self.code = self.process.returncode
        return self

    @property
    def logs(self) -> Path:
        (folder,) = self.output_dir.glob("logs/attempt-*/node-000-*")
        return folder

    def rank_log(self, rank: int) -> str:
        return (self.logs / f"rank-{rank:05d}.log").read_text()

    def agent_log(self) -> str:
        return (self.logs / "agent.log").read_text()


class Launcher:
    """Writes scripts into a folder and launches them from there."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._launched: list[Launched] = []

    def script(self, text: str, name: str = "script.py") -> Path:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text))
        return path

    def start(
        self, script: str | Path, *, env: dict[str, str] | None = None, **fields: Any
    ) -> Launched:
        path = script if isinstance(script, Path) else self.script(script)
        output_dir = self.folder / "run"
        fields = {"source": str(path), "output_dir": str(output_dir), **fields}
        process = subprocess.Popen(
            [sys.executable, str(_DRIVE), json.dumps(fields)],
            cwd=self.folder,
            env=self.environment(env),
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        launched = Launched(process, output_dir)
        self._launched.append(launched)
        return launched

    def environment(self, extra: dict[str, str] | None = None) -> dict[str, str]:
        path = os.pathsep.join([str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, **(extra or {})}

    def run(self, script: str | Path, **fields: Any) -> Launched:
        return self.start(script, **fields).wait()

    def close(self) -> None:
        for launched in self._launched:
            if launched.process.poll() is None:
                launched.process.kill()
                launched.process.wait()


@pytest.fixture
def launcher(tmp_path: Path) -> Iterator[Launcher]:
    made = Launcher(tmp_path)
    yield made
    made.close()


@pytest.fixture(params=["fork", "fresh"])
def start(request: pytest.FixtureRequest) -> dict[str, Any]:
    """Either way of starting a rank, as fields of a plan."""
    return {"start_method": request.param}


@pytest.fixture
def gloo(start: dict[str, Any]) -> dict[str, Any]:
    """The same with what a collective needs imported before the fork."""
    return {**start, "preload": _GLOO if start["start_method"] == "fork" else ()}


@pytest.fixture
def wait_for() -> Callable[..., Any]:
    def wait(what: Callable[[], Any], timeout_s: float = 60.0) -> Any:
        limit = time.monotonic() + timeout_s
        while time.monotonic() < limit:
            value = what()
            if value:
                return value
            time.sleep(0.02)
        raise TimeoutError(f"waited {timeout_s} s in vain")

    return wait


@pytest.fixture
def still_alive() -> Callable[[list[int]], list[int]]:
    def alive(pids: list[int]) -> list[int]:
        return [pid for pid in pids if _runs(pid)]

    return alive


def _runs(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
