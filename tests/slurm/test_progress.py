from __future__ import annotations

from pathlib import Path

from slurm_plans import make_plan

from bigtrain.cluster.lifeline import Verdict
from bigtrain.cluster.signals import EXIT_AGAIN
from bigtrain.slurm.progress import Progress

LOST = Verdict(code=EXIT_AGAIN, cause="node1 vanished", lost=("node1",))


def _start(folder: Path, restarts: int, kind: str = "run_file") -> Progress:
    plan = make_plan(output_dir=folder, source=folder / "run.yaml", kind=kind)
    return Progress(plan, environment={"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": str(restarts)})


def test_a_second_start_in_a_row_that_is_lost_without_a_checkpoint_is_the_last(
    tmp_path: Path,
) -> None:
    assert _start(tmp_path, 0).judge(LOST) == LOST
    second = _start(tmp_path, 1)
    for last in (second.judge(LOST), second.judge(LOST)):  # of several nodes, each asks
        assert last.code == 1
        assert last.cause is not None
        assert last.cause.startswith("node1 vanished\nthe second start in a row that saved nothing")
        assert "(no checkpoint)" in last.cause


def test_a_start_that_saved_something_is_no_such_one(tmp_path: Path) -> None:
    assert _start(tmp_path, 0).judge(LOST) == LOST
    second = _start(tmp_path, 1)
    (tmp_path / "checkpoint-5").mkdir()
    assert second.judge(LOST) == LOST
    assert _start(tmp_path, 2).judge(LOST) == LOST
    third = _start(tmp_path, 3).judge(LOST)
    assert third.code == 1
    assert "(checkpoint-5)" in str(third.cause)


def test_only_starts_that_want_another_count_where_checkpoints_can_be_seen(tmp_path: Path) -> None:
    done = Verdict(code=0, cause=None)
    for restarts in range(3):
        assert _start(tmp_path, restarts).judge(done) == done
        assert _start(tmp_path, restarts, kind="script").judge(LOST) == LOST


def test_notices_that_come_before_the_first_save_end_it_too(tmp_path: Path) -> None:
    notice = Verdict(code=EXIT_AGAIN, cause=None)
    assert _start(tmp_path, 0).judge(notice) == notice
    last = _start(tmp_path, 1).judge(notice)
    assert last.code == 1
    assert "is the time limit too short" in str(last.cause)
