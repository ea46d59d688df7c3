"""Committed checkpoints become models that `from_pretrained` loads, while training goes on.

    checkpoint-500/model/   config, tokenizer, model.safetensors

Made on the main rank by a process of its own, one at a time: it takes some 30 MB of memory and no
part in the interpreter's lock. It ends with the rank.
"""

from __future__ import annotations

import logging
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bigtrain.trainer.arguments import TrainingArguments

logger = logging.getLogger(__name__)

MODEL = "model"
"""Where in the checkpoint: it is rotated with it."""
_COMMAND = (sys.executable, "-m", "bigtrain.checkpoint.consolidate")


class Exports:
    """Of every `interval`-th checkpoint; of none where it is 0."""

    def __init__(self, *, interval: int) -> None:
        self._interval = interval
        self._count = 0
        self._running: subprocess.Popen[bytes] | None = None
        self._said = tempfile.TemporaryFile()  # noqa: SIM115 (kept; a pipe would fill up)
        self._source: Path | None = None
        self._waiting: Path | None = None

    @classmethod
    def asked(cls, args: TrainingArguments, *, is_sharded: bool) -> Exports:
        """As the arguments say; none where a checkpoint is a model already, and on other ranks."""
        wanted = args.export == "every" and is_sharded and args.should_save
        return cls(interval=args.export_interval if wanted else 0)

    def add(self, checkpoint: Path) -> None:
        """It was committed: it is exported, as soon as the one before is done."""
        self._count += 1
        if not self._interval or self._count % self._interval:
            return
        self._go_on()
        if self._waiting is not None:
            logger.warning("%s was not exported: the disk is too slow", self._waiting)
        self._waiting = checkpoint
        self._go_on()

    def _go_on(self) -> None:
        if self._running is not None and self._running.poll() is not None:
            self._end()
        if self._running is None and self._waiting is not None:
            self._source, self._waiting = self._waiting, None
            self._said.seek(0)
            self._said.truncate()
            self._running = subprocess.Popen(
                [*_COMMAND, str(self._source), str(self._source / MODEL)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=self._said,
            )

    @property
    def in_use(self) -> set[Path]:
        """Checkpoints that have to stay."""
        return {path for path in (self._source, self._waiting) if path is not None}

    def close(self, *, wait: bool) -> None:
        """Let all of them end, or (a rank that is told to go has no time) none."""
        while self._running is not None and wait:
            self._end()
            self._go_on()
        if self._running is not None:
            self._running.kill()
            self._running.wait()
            logger.warning("%s was not exported: training stopped", self._source)
        self._running = self._source = self._waiting = None

    def _end(self) -> None:
        assert self._running is not None
        assert self._source is not None
        if self._running.wait():
            self._said.seek(0)
            fault = self._said.read().decode(errors="replace").strip()[-2000:]
            logger.warning("%s was not exported: %s", self._source, fault)
        else:
            logger.info("exported %s", self._source / MODEL)
        self._running = self._source = None
