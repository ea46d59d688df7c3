"""The logs of all nodes and ranks as one: in time, by rank, by node, and as they grow."""

from __future__ import annotations

import calendar
import resource
import time
import tracemalloc
from pathlib import Path

import pytest

from bigtrain.cluster.run_logs import Reader, attempts, merged, read_since, sources
from bigtrain.errors import ConfigError
from bigtrain.log_time import read_stamp, stamp


@pytest.fixture
def attempt(tmp_path: Path) -> Path:
    folder = tmp_path / "logs" / "attempt-01"
    texts = {
        "node-000-rack1/agent.log": "2026-01-02 10:00:00.500 rank 0 is pid 7\n",
        "node-000-rack1/rank-00000.log": (
            "a banner without a time\n"
            "2026-01-02 10:00:01,000 INFO x: first\n"
            "  its second line\n"
            "2026-01-02 10:00:03,000 INFO x: third\n"
        ),
        "node-001-rack2/rank-00001.log": "2026-01-02 10:00:02,000 INFO x: second\n",
        "node-001-rack2/store.log": "not a rank's\n",
    }
    for name, text in texts.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def _texts(readers: list[Reader]) -> list[str]:
    return [f"[{line.label}] {line.text}" for line in merged(readers)]


def test_progress_is_a_line_of_rank_0_in_its_place(attempt: Path) -> None:
    when = time.mktime((2026, 1, 2, 10, 0, 1, 0, 0, -1)) + 0.5
    lines = [f'{{"time": {when}, "step": 5, "loss": 3.25, "grad_norm": 1.5}}', "[]", "{half"]
    (attempt / "node-000-rack1" / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    shown = _texts([Reader(source) for source in sources(attempt, ranks=[0, 1])])
    progress = f"[rack1:0] {stamp(when)} step 5  loss 3.250  norm 1.50"
    assert shown[3:6] == [progress, "[rack1:0] []", "[rack1:0] {half"]
    assert shown[6] == "[rack2:1] 2026-01-02 10:00:02,000 INFO x: second"


def test_lines_are_in_the_order_of_time_and_those_without_one_keep_their_place(
    attempt: Path,
) -> None:
    assert attempts(attempt.parents[1]) == [attempt]
    assert _texts([Reader(source) for source in sources(attempt)]) == [
        "[rack1:agent] 2026-01-02 10:00:00.500 rank 0 is pid 7",
        "[rack1:0] a banner without a time",
        "[rack1:0] 2026-01-02 10:00:01,000 INFO x: first",
        "[rack1:0]   its second line",
        "[rack2:1] 2026-01-02 10:00:02,000 INFO x: second",
        "[rack1:0] 2026-01-02 10:00:03,000 INFO x: third",
    ]


def test_ranks_and_nodes_are_chosen_by_number_or_name(attempt: Path) -> None:
    assert [source.label for source in sources(attempt, ranks=[1])] == ["rack2:1"]
    assert [source.label for source in sources(attempt, nodes=["rack2"])] == ["rack2:1"]
    assert [source.label for source in sources(attempt, nodes=["0"])] == ["rack1:agent", "rack1:0"]


def test_a_reader_goes_on_where_it_was_and_waits_for_the_end_of_a_line(attempt: Path) -> None:
    (source,) = sources(attempt, ranks=[1])
    reader = Reader(source)
    assert len(list(reader.lines(is_final=False))) == 1
    with source.path.open("a") as file:
        file.write("half a l")
    assert list(reader.lines(is_final=False)) == []
    with source.path.open("a") as file:
        file.write("ine\n12%\r57%\r100%\n")
    assert [line.text for line in reader.lines(is_final=False)] == ["half a line", "100%"]


def test_since_is_a_span_or_a_time() -> None:
    assert read_since("10m", now=1000.0) == 400.0
    expected = time.mktime((2026, 1, 31, 12, 0, 0, 0, 0, -1))
    for form in ("2026-01-31 12:00", "2026-01-31T12:00", "2026-01-31T12:00:00"):
        assert read_since(form, now=0.0) == expected
    with pytest.raises(ConfigError, match="'yesterday' is neither 10m"):
        read_since("yesterday", now=0.0)


def test_attempts_are_in_order_beyond_the_hundredth(tmp_path: Path) -> None:
    for number in (9, 99, 100):
        (tmp_path / "logs" / f"attempt-{number:02d}").mkdir(parents=True)
    names = [path.name for path in attempts(tmp_path)]
    assert names == ["attempt-09", "attempt-99", "attempt-100"]


def test_more_logs_than_a_process_may_open_are_merged(tmp_path: Path) -> None:
    folder = tmp_path / "logs" / "attempt-01" / "node-000-a"
    folder.mkdir(parents=True)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = max(int(path.name) for path in Path("/proc/self/fd").iterdir()) + 50
    number = most + 200
    for rank in range(number):
        text = f"2026-01-02 10:00:{rank % 60:02d},000 INFO x: {rank}\n"
        (folder / f"rank-{rank:05d}.log").write_text(text)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, limits[1]))
    try:
        texts = _texts([Reader(source) for source in sources(folder.parent)])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert len(texts) == number
    assert [text.split()[2] for text in texts] == sorted(text.split()[2] for text in texts)


def test_a_long_log_is_merged_in_little_memory_and_since_reads_little_of_it(
    attempt: Path,
) -> None:
    (source,) = sources(attempt, ranks=[1])
    line = "2026-01-02 {:02d}:{:02d}:00,000+0000 INFO x: " + "y" * 90 + "\n"
    with source.path.open("w") as file:
        for minute in range(24 * 60):
            file.write(line.format(minute // 60, minute % 60) * 60)
    assert source.path.stat().st_size > 10 << 20

    tracemalloc.start()
    count = sum(1 for _ in merged([Reader(source)], is_final=False))
    reader = Reader(source)
    reader.skip_to(calendar.timegm((2026, 1, 2, 23, 0, 0)))
    late = [line.text for line in reader.lines()]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()

    assert count == 24 * 60 * 60
    assert late[-1].startswith("2026-01-02 23:59")
    assert sum("02 23:" in text for text in late) == 3600
    assert len(late) < 2 * 3600
    assert peak < 8 << 20


@pytest.mark.parametrize("zone", ["UTC", "Europe/Berlin", "America/St_Johns"])
def test_times_are_the_same_in_every_time_zone(zone: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", zone)
    time.tzset()
    try:
        written = stamp(1_800_000_000.25)
        monkeypatch.setenv("TZ", "Asia/Kolkata")
        time.tzset()
        assert read_stamp(f"{written} hello".encode()) == 1_800_000_000.25
        assert read_stamp(b"2027-01-15 09:00:00,250+0100 hello") == 1_800_000_000.25
        assert read_stamp(b"2027-99-15 09:00:00,250+0100 hello") is None
    finally:
        monkeypatch.delenv("TZ")
        time.tzset()
