"""Questions that only the real model can answer, asked in a process of its own and remembered.

The process imports torch and transformers, which takes seconds; its answers are small and depend
on nothing but the question and the installed versions, so they are kept on disk.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from bigtrain.errors import ConfigError

_T = TypeVar("_T")

REFUSED = 3
"""The worker's exit code where transformers can't make the model."""
_WORKER = "bigtrain.memory.answers"
_TIMEOUT_S = 600
_PACKAGE_ROOT = Path(__file__).resolve().parents[2]


class RefusedModelError(ConfigError):
    """transformers can't make the model, here or anywhere."""


@dataclass(frozen=True, kw_only=True)
class Asker:
    """Where answers are kept, and the environment of the process that gives them."""

    cache: Path
    environment: Mapping[str, str]

    def ask(self, question: Mapping[str, Any], *, read: Callable[[Any], _T]) -> _T:
        """The answer, from the cache or from a process. ConfigError where the model can't be made.

        `question` is plain JSON; `kind` says what is asked (`answers.py` lists the kinds). `read`
        makes of the answer what is needed; what was kept and can't be read is asked for again.
        """
        text = json.dumps(question, sort_keys=True)
        path = self.cache / f"{_fingerprint(text)}.json"
        try:
            return read(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError, LookupError, RecursionError):
            answer = self._run(text)
        _keep(path, answer)
        return read(answer)

    def _run(self, text: str) -> Any:
        paths = [str(_PACKAGE_ROOT), self.environment.get("PYTHONPATH", "")]
        environment = {
            **self.environment,
            "PYTHONPATH": os.pathsep.join(path for path in paths if path),
            "CUDA_VISIBLE_DEVICES": "",
        }
        done = subprocess.run(
            [sys.executable, "-m", _WORKER],
            input=text,
            capture_output=True,
            text=True,
            env=environment,
            timeout=_TIMEOUT_S,
            check=False,
        )
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
            kind = RefusedModelError if done.returncode == REFUSED else ConfigError
            raise kind(f"model: it can't be built to measure its memory: {reason}")
        return json.loads(done.stdout.splitlines()[-1])


def _fingerprint(text: str) -> str:
    """The question, the versions that answer it, and the code that does."""
    versions = [_version(name) for name in ("torch", "transformers", "peft")]
    code = Path(__file__).with_name("answers.py").read_bytes()
    return hashlib.sha256(repr((text, versions)).encode() + code).hexdigest()[:32]


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _keep(path: Path, answer: Any) -> None:
    """Best effort: where nothing can be written, the question is asked again next time."""
    staged = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        staged.write_text(json.dumps(answer), encoding="utf-8")
        staged.replace(path)
    except OSError:
        staged.unlink(missing_ok=True)
