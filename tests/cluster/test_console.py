from __future__ import annotations

import io
import json
import math
import os
import pty
import subprocess
import sys
from typing import Any

import pytest

from bigtrain.console import Event, JsonConsole, PlainConsole, open_console, progress_line

_FIGURES = {
    "step": 20,
    "total": 200,
    "loss": 3.41234,
    "learning_rate": 2.9e-4,
    "tokens_per_s": 1234.5,
    "eta_s": 41.2,
}


def _event(kind: str, rank: int = 0, **fields: Any) -> Event:
    return Event(node_rank=1, rank=rank, kind=kind, fields=fields)


def test_a_progress_line_says_what_is_known() -> None:
    assert progress_line(_FIGURES) == ("step 20/200  loss 3.412  lr 2.9e-04  1.2k tok/s  eta 0:41")
    assert progress_line({"step": 1, "loss": None, "eta_s": math.nan}) == "step 1"
    assert progress_line({"step": 1, "loss": math.nan, "eta_s": 7265}) == (
        "step 1  loss nan  eta 2:01:05"
    )


def test_plain_lines_go_where_they_belong() -> None:
    out, err = io.StringIO(), io.StringIO()
    console = PlainConsole(out, err)
    console.say("starting")
    console.show(_event("progress", **_FIGURES))
    console.show(_event("notice", text="calm"))
    console.show(_event("notice", 3, text="of another rank"))
    console.show(_event("warning", 3, text="careful"))
    console.show(_event("warning", text="careful"))
    console.show(_event("saved", path="out/checkpoint-5", step=5))
    console.show(_event("evaluated", step=5, eval_loss=2.5, eval_runtime=1.0))
    console.show(_event("evaluated", 3, step=5, eval_loss=2.5))
    console.show(_event("failed", 3))
    console.show(_event("made-up", 3))
    console.output(b"raw\n")
    console.fail("rank 3 failed", details={"rank": 3})
    console.end({"exit_code": 1})
    assert out.getvalue() == (
        "step 20/200  loss 3.412  lr 2.9e-04  1.2k tok/s  eta 0:41\n"
        "calm\nsaved out/checkpoint-5\nstep 5: eval_loss 2.5000\nraw\n"
    )
    assert err.getvalue() == ("starting\n[1:3] warning: careful\nwarning: careful\nrank 3 failed\n")


def test_json_lines_are_json() -> None:
    out = io.StringIO()
    console = JsonConsole(out)
    console.say("starting")
    console.show(_event("progress", 2, step=1, loss=math.nan, more=[math.inf]))
    console.output(b"raw \xff\n")
    console.fail("bad", details={"rank": 3, "exit_code": 9})
    console.end({"exit_code": 9, "checkpoint": None})
    records = [
        json.loads(line, parse_constant=lambda name: 1 / 0) for line in out.getvalue().splitlines()
    ]
    assert records == [
        {"kind": "launcher", "text": "starting"},
        {"kind": "progress", "rank": 2, "node_rank": 1, "step": 1, "loss": None, "more": [None]},
        {"kind": "output", "rank": 0, "text": "raw \ufffd\n"},
        {"kind": "failure", "text": "bad", "rank": 3, "exit_code": 9},
        {"kind": "end", "exit_code": 9, "checkpoint": None},
    ]


def test_a_terminal_has_one_line_that_is_rewritten() -> None:
    script = (
        "from bigtrain.console import Event, open_console\n"
        "console = open_console()\n"
        "def show(kind, **fields):\n"
        "    console.show(Event(node_rank=0, rank=0, kind=kind, fields=fields))\n"
        "for step in range(3): show('progress', step=step, total=3)\n"
        "show('notice', text='a notice')\n"
        "console.output(b'raw\\n')\n"
        "for step in range(2): show('progress', step=step + 3, total=5)\n"
        "console.close(); console.close()\n"
    )
    ours, theirs = pty.openpty()
    subprocess.run(
        [sys.executable, "-c", script],
        stdout=theirs,
        stderr=subprocess.PIPE,
        check=True,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "80"},
    )
    os.close(theirs)
    shown = os.read(ours, 65_536).decode()
    os.close(ours)
    # Every state but the last is erased (CSI 2K); the notice and the raw output stand.
    assert shown.count("\x1b[2K") >= 4
    assert "a notice\r\n" in shown
    assert "raw\r\n" in shown
    assert shown.rstrip().endswith("4/5") or "step 4/5" in shown.split("raw")[1]


def test_a_reader_that_left_does_not_end_the_run() -> None:
    script = (
        "import sys\nfrom bigtrain.console import open_console\n"
        "console = open_console()\n"
        "sys.stdin.read()\n"
        "for _ in range(3): console.output(b'x' * 100_000)\n"
        "console.say('still here')\n"
        "import os; os._exit(0)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout and process.stdin and process.stderr
    process.stdout.close()
    process.stdin.close()
    assert process.stderr.read() == b"still here\n"
    process.stderr.close()
    assert process.wait() == 0


def test_what_a_stream_cannot_encode_is_shown_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="latin-1"))
    open_console().show(_event("notice", text="3 → 4"))
    assert raw.getvalue() == b"3 \\u2192 4\n"
