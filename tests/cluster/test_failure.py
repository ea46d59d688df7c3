from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest

from bigtrain.cluster import failure
from bigtrain.cluster.failure import ErrorReport, RankExit


def _report(rank: int, *, time: float, message: str = "no") -> ErrorReport:
    return ErrorReport(
        rank=rank, host="h", time=time, type="E", message=message, traceback="E: no\n", exit_code=1
    )


def _exit(rank: int, status: int, *, time: float = 1.0, **fields: Any) -> RankExit:
    defaults = {"host": "h", "log": Path("none.log"), "report": None, "ended_by_us": False}
    return RankExit(rank=rank, status=status, time=time, **{**defaults, **fields})


_RESET = "[tcp/pair.cc:537] Read error [127.0.0.1]:19881: Connection reset by peer"


@pytest.mark.parametrize(
    ("exits", "cause"),
    [
        ([_exit(0, 0), _exit(1, 0)], None),
        ([_exit(0, 0), _exit(1, -15, ended_by_us=True)], None),
        ([_exit(0, 1, report=_report(0, time=3)), _exit(1, 1, report=_report(1, time=2))], 1),
        ([_exit(0, 1, report=_report(0, time=1)), _exit(1, -signal.SIGKILL, time=2)], 1),
        ([_exit(0, 1, report=_report(0, time=2)), _exit(1, -signal.SIGABRT, time=1)], 0),
        ([_exit(0, 1, report=_report(0, time=1, message=_RESET)), _exit(1, 3, time=2)], 1),
        ([_exit(0, 1, report=_report(0, time=1, message=_RESET)), _exit(1, 0)], 0),
        (
            [
                _exit(0, -9, report=_report(0, time=1), ended_by_us=True),
                _exit(1, -15, ended_by_us=True),
            ],
            0,
        ),
    ],
)
def test_the_cause_is_told_from_its_consequences(exits: list[RankExit], cause: int | None) -> None:
    first = failure.first_failure(exits)
    assert (first.rank if first else None) == cause


def test_a_rank_that_had_to_be_killed_keeps_the_code_of_its_exception() -> None:
    assert _exit(0, -9, report=_report(0, time=1), ended_by_us=True).exit_code == 1
    assert _exit(0, -9).exit_code == 137
    assert _exit(0, 6).exit_code == 6


def test_a_report_that_can_not_be_read_is_none(tmp_path: Path) -> None:
    path = tmp_path / "report"
    assert failure.read(path) is None
    for text in ("", "{", "[]", '{"rank": 1}', "\0"):
        path.write_text(text)
        assert failure.read(path) is None


def test_an_error_whose_text_raises_is_still_recorded(tmp_path: Path) -> None:
    class SilentError(Exception):
        def __str__(self) -> str:
            raise RuntimeError

    failure.record(SilentError(), path=tmp_path / "e.json", rank=2, host="h")
    report = failure.read(tmp_path / "e.json")
    assert report is not None
    assert report.message.endswith("SilentError that can't be shown>")


def test_recording_on_a_disk_that_is_gone_raises_nothing(tmp_path: Path) -> None:
    failure.record(ValueError(), path=tmp_path / "no" / "e.json", rank=2, host="h")


def test_without_a_report_the_logs_end_is_shown(tmp_path: Path) -> None:
    log = tmp_path / "rank.log"
    log.write_bytes(b"".join(b"line %d\n" % n for n in range(50)) + b" 1%\r 2%\r 3%\n\xff\n\n")
    lines = failure.describe(_exit(1, 7, log=log)).splitlines()
    assert lines[0] == "rank 1 on h failed with exit code 7"
    assert lines[-4:] == ["  line 49", "   3%", "  \ufffd", f"its log: {log}"]
    assert len(lines) == 14
