from __future__ import annotations

import os
import threading
import time
from pathlib import Path

from bigtrain.cluster.time_limit import TimeLimit, last_save_s, lead_s, watched


def _checkpoint(folder: Path, *, took: int) -> None:
    (folder / "checkpoint-5" / "weights").mkdir(parents=True)
    for name, written in (("weights/a", 1000), ("manifest.json", 1000 + took)):
        (folder / "checkpoint-5" / name).write_text("{}")
        os.utime(folder / "checkpoint-5" / name, (written, written))


def test_the_lead_is_two_saves_but_never_half_of_the_limit(tmp_path: Path) -> None:
    assert last_save_s(tmp_path) is None
    assert lead_s(last_save_s(tmp_path)) == 120
    _checkpoint(tmp_path, took=300)
    assert lead_s(last_save_s(tmp_path)) == 600
    assert lead_s(last_save_s(tmp_path), limit_s=900.0) == 450


def test_a_run_whose_saves_have_become_longer_is_told_earlier(tmp_path: Path) -> None:
    now = time.time()
    told = threading.Event()
    limit = TimeLimit(starts=now - 3600, ends=now + 500)
    with watched(lambda: limit, tmp_path, notify=lambda why: told.set()):
        assert not told.wait(0.5)
    _checkpoint(tmp_path, took=300)
    with watched(lambda: limit, tmp_path, notify=lambda why: told.set()):
        assert told.wait(10)


def test_a_limit_that_was_extended_meanwhile_is_the_one_that_counts(tmp_path: Path) -> None:
    now = time.time()
    limits = [TimeLimit(starts=now - 3600, ends=now + more) for more in (60, 3600)]
    answers = iter([*limits, None])
    asked, told = threading.Event(), threading.Event()

    def read() -> TimeLimit | None:
        answer = next(answers)
        if answer is limits[1]:
            asked.set()
        return answer

    with watched(read, tmp_path, notify=lambda why: told.set()):
        assert asked.wait(10)
        assert not told.wait(0.5)


def test_without_a_limit_nothing_is_told(tmp_path: Path) -> None:
    told = threading.Event()
    with watched(lambda: None, tmp_path, notify=lambda why: told.set()):
        assert not told.wait(0.3)
