"""What is in memory at the end is not given up because one save failed."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest

from bigtrain.trainer.trainer import Trainer
from tests.trainer.samples import Sentences
from tests.trainer.test_survival import STEPS, run_of


class LosesItsWriter(Trainer):
    """While it writes the last checkpoint."""

    def _save_and_tell(self, model: Any, trial: Any) -> None:
        is_first = self.state.global_step == STEPS and self._saver is not None
        process = self._saver._writer._process if is_first else None  # type: ignore[union-attr]
        if process is not None:
            self._finish_save()  # of the step before, while it can be
            process.send_signal(signal.SIGSTOP)
        super()._save_and_tell(model, trial)
        if process is not None and process.poll() is None:
            process.kill()
            process.wait()


def test_the_last_save_is_made_once_more_where_it_failed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base = run_of(tmp_path, async_save=True)
    run = LosesItsWriter(model=base.model, args=base.args, train_dataset=Sentences(60))
    run.train()
    assert "the last save failed, saving once more: the process that writes" in caplog.text
    assert (tmp_path / f"checkpoint-{STEPS}" / "manifest.json").is_file()
