"""The run's figures for people: JSON lines beside the rank's log, and the console's progress.

Only under bigtrain's launcher, and only at logging steps: nothing here waits for the device in
between. `log_history` and the callbacks get what transformers gives them, and no more.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import TrainerState

from bigtrain.trainer import environment
from bigtrain.trainer.arguments import TrainingArguments

METRICS_FILE = "metrics.jsonl"

# Dense bf16/fp16 peak of a device, in floating-point operations a second, by a part of its name;
# from the makers' data sheets. The first that fits counts.
_PEAK_FLOPS: tuple[tuple[str, float], ...] = (
    ("B200", 2.25e15),
    ("H200", 9.89e14),
    ("H100 PCIe", 7.56e14),
    ("H100", 9.89e14),
    ("A100", 3.12e14),
    ("L40S", 3.62e14),
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

    def count(self, *, tokens: int, flos: float) -> None:
        """A micro-batch of this rank: sizes only, no device value."""
        self._tokens += tokens
        self._flos += flos

    def report(self, logs: Mapping[str, Any], state: TrainerState) -> None:
        """A logging step: `logs` as the callbacks get them."""
        figures = {"step": state.global_step, **logs, **self._speed(state.global_step)}
        figures.update(self._memory())
        self.start(step=state.global_step)
        self._write(figures)
        if self._is_on and environment.has_console():
            _emit("progress", **_progress(figures, state))

    def report_evaluation(self, metrics: Mapping[str, Any], state: TrainerState) -> None:
        """An evaluation is done. The time it took is no part of the next step times."""
        self._write({"step": state.global_step, **metrics})
        self._since = time.perf_counter()
        if self._is_on and environment.has_console():
            figures = {k: v for k, v in metrics.items() if isinstance(v, (int, float))}
            _emit("evaluated", **{"step": state.global_step, **figures})

    def saved(self, path: Path, step: int) -> None:
        """A checkpoint is committed."""
        self._since = time.perf_counter()
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
        line = json.dumps({"time": time.time(), **figures}, default=float)
        with self._file.open("a", encoding="utf-8") as lines:
            lines.write(line + "\n")


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
    return next((peak for part, peak in _PEAK_FLOPS if part in name), None)


def _emit(kind: str, **fields: Any) -> None:
    from bigtrain.cluster import events

    events.emit(kind, **fields)
