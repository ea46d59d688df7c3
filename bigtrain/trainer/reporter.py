"""The run's figures for people: JSON lines beside the rank's log, and the console's progress.

Only under bigtrain's launcher, and only at logging steps: nothing here waits for the device in
between. `log_history` and the callbacks get what transformers gives them, and no more.
"""

from __future__ import annotations

import json
import logging
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import TrainerState

from bigtrain.console import finite
from bigtrain.trainer import environment
from bigtrain.trainer.arguments import TrainingArguments

logger = logging.getLogger(__name__)

METRICS_FILE = "metrics.jsonl"

# Dense bf16/fp16 peak of a device, in floating-point operations a second, by a part of its name;
# from the makers' data sheets. Whole words; the first that fits counts.
_PEAK_FLOPS: tuple[tuple[str, float], ...] = (
    ("GB200", 2.5e15),
    ("B200", 2.25e15),
    ("GH200", 9.89e14),
    ("H200", 9.89e14),
    ("H100 PCIe", 7.56e14),
    ("H100 NVL", 8.35e14),
    ("H100", 9.89e14),
    ("A100", 3.12e14),
    ("L40S", 3.62e14),
    ("L40", 1.81e14),
    ("A10G", 7.0e13),
    ("L4", 1.21e14),
    ("V100", 1.25e14),
    ("T4", 6.5e13),
)


class Reporter:
    """Counts what passes between two logging steps, and writes it down at the second."""

    def __init__(self, *, args: TrainingArguments, device: torch.device) -> None:
        log_dir = environment.log_dir()
        self._is_on = args.process_index == 0
        self._file: Path | None = log_dir / METRICS_FILE if log_dir and self._is_on else None
        self._world_size = args.world_size
        self._device = device
        self._peak_flops = _peak_flops(device)
        self.start(step=0)

    def start(self, *, step: int) -> None:
        """A training begins or goes on at `step`."""
        self._tokens = 0
        self._flos = 0.0
        self._since = time.perf_counter()
        self._step = step

    @contextmanager
    def pausing(self) -> Iterator[None]:
        """Inside, time passes that is no part of a step's: an evaluation, a save."""
        start = time.perf_counter()
        yield
        self._since += time.perf_counter() - start

    def count(self, *, tokens: int, flos: float) -> None:
        """A micro-batch of this rank: sizes only, no device value."""
        self._tokens += tokens
        self._flos += flos

    def report(self, logs: Mapping[str, Any], state: TrainerState) -> None:
        """A logging step: `logs` as the callbacks get them."""
        if self._file is None and not (self._is_on and environment.has_console()):
            return
        figures = {"step": state.global_step, **logs, **self._speed(state.global_step)}
        figures.update(self._memory())
        self.start(step=state.global_step)
        self._write(figures)
        if self._is_on and environment.has_console():
            _emit("progress", **_progress(figures, state))

    def report_evaluation(self, metrics: Mapping[str, Any], state: TrainerState) -> None:
        """An evaluation is done."""
        self._write({"step": state.global_step, **metrics})
        if self._is_on and environment.has_console():
            figures = {k: v for k, v in metrics.items() if isinstance(v, (int, float))}
            _emit("evaluated", **{"step": state.global_step, **figures})

    def saved(self, path: Path, step: int) -> None:
        """A checkpoint is committed."""
        if self._is_on and environment.has_console():
            _emit("saved", path=str(path), step=step)

    def say(self, text: str) -> None:
        """One calm line on the console, from rank 0."""
        if self._is_on and environment.has_console():
            _emit("notice", text=text)

    def _speed(self, step: int) -> dict[str, float]:
        elapsed = time.perf_counter() - self._since
        steps = step - self._step
        if elapsed <= 0 or steps <= 0:
            return {}
        speed = {
            "step_time_s": elapsed / steps,
            "tokens_per_s": self._tokens * self._world_size / elapsed,
        }
        if self._peak_flops:
            speed["mfu"] = self._flos / elapsed / self._peak_flops
        return speed

    def _memory(self) -> dict[str, int]:
        memory = {"memory_rss_bytes": psutil.Process().memory_info().rss}
        if self._device.type == "cuda":
            memory["memory_device_peak_bytes"] = torch.cuda.max_memory_allocated(self._device)
        return memory

    def _write(self, figures: Mapping[str, Any]) -> None:
        if self._file is None:
            return
        line = json.dumps(finite({"time": time.time(), **figures}), default=float)
        try:
            with self._file.open("a", encoding="utf-8") as lines:
                lines.write(line + "\n")
        except OSError as error:  # a full disk, say: training goes on without its figures
            logger.warning("%s: %s; no more figures are written", self._file, error.strerror)
            self._file = None


def _progress(figures: Mapping[str, Any], state: TrainerState) -> dict[str, Any]:
    left = state.max_steps - state.global_step
    return {
        "step": state.global_step,
        "total": state.max_steps,
        "loss": figures.get("loss"),
        "learning_rate": figures.get("learning_rate"),
        "grad_norm": figures.get("grad_norm"),
        "tokens_per_s": figures.get("tokens_per_s"),
        "eta_s": figures["step_time_s"] * left if "step_time_s" in figures else None,
    }


def _peak_flops(device: torch.device) -> float | None:
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return peak_flops_of(name)


def peak_flops_of(name: str) -> float | None:
    """Of a device by the name its driver gives it, in bf16 operations a second; None: not known."""
    found = (peak for part, peak in _PEAK_FLOPS if re.search(rf"\b{part}\b", name))
    return next(found, None)


def _emit(kind: str, **fields: Any) -> None:
    from bigtrain.cluster import events

    events.emit(kind, **fields)
