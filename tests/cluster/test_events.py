from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator

import pytest

from bigtrain.cluster import events


@pytest.fixture
def pipe(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    output, end = os.pipe()
    os.set_blocking(output, False)
    os.set_blocking(end, False)
    monkeypatch.setenv(events.EVENT_VARIABLE, events.describe_pipe(end))
    yield output
    os.close(output)
    os.close(end)


def _read(pipe: int) -> list[dict[str, object]]:
    return [json.loads(line) for line in os.read(pipe, 1 << 20).splitlines()]


def test_an_event_is_one_line(pipe: int) -> None:
    events.emit("progress", step=3, loss=2.5)
    events.emit("notice", text="two\nlines")
    assert _read(pipe) == [
        {"kind": "progress", "step": 3, "loss": 2.5},
        {"kind": "notice", "text": "two\nlines"},
    ]


@pytest.mark.parametrize("text", ["x" * 9_000, "\U0001f600" * 9_000, "\0" * 9_000])
def test_a_long_text_is_cut_so_that_its_line_is_written_at_once(pipe: int, text: str) -> None:
    events.emit("error", text=text, step=7)
    line = os.read(pipe, 1 << 20)
    assert len(line) < 4096
    event = json.loads(line)
    assert event["step"] == 7
    assert event["text"] == text[:300] + " …"


def test_a_full_pipe_holds_nothing_up(pipe: int) -> None:
    for step in range(5_000):
        events.emit("progress", step=step)
    assert _read(pipe)[0] == {"kind": "progress", "step": 0}


def test_without_an_agent_nothing_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(events.EVENT_VARIABLE, raising=False)
    events.emit("notice", text="to nobody")


@pytest.mark.parametrize("value", ["", "x", "1", "1:5", "999:1", ":"])
def test_a_number_that_is_not_the_pipe_is_left_alone(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], value: str
) -> None:
    monkeypatch.setenv(events.EVENT_VARIABLE, value)
    events.emit("notice", text="astray")
    assert capfd.readouterr().out == ""


def test_records_become_events_of_rank_0_from_info_and_of_others_from_warning(pipe: int) -> None:
    for is_main in (True, False):
        logger = logging.Logger("test")
        logger.addHandler(events.EventHandler(is_main=is_main))
        logger.debug("hidden")
        logger.info("note %s", is_main)
        logger.warning("careful")
    assert [(e["kind"], e["text"]) for e in _read(pipe)] == [
        ("notice", "note True"),
        ("warning", "careful"),
        ("warning", "careful"),
    ]
