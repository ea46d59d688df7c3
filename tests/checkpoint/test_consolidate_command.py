"""The command: what it prints, how it ends, and that it needs neither torch nor much memory."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

MEGABYTE = 1 << 20
WALLED = """
import sys

class Wall:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"torch", "transformers", "accelerate", "deepspeed"}:
            raise ImportError(f"{name} is behind the torch wall")

sys.meta_path.insert(0, Wall())
if "--slowly" in sys.argv:
    sys.argv.remove("--slowly")
    import os, time
    import bigtrain.checkpoint.consolidate.sink as sink
    sink._SYNC_BYTES = 1 << 20
    pwrite = os.pwrite
    os.pwrite = lambda *a: (time.sleep(0.1), pwrite(*a))[1]
if "--pause" in sys.argv:
    at = sys.argv.index("--pause")
    module, name, call, said = sys.argv[at + 1 : at + 5]
    del sys.argv[at : at + 5]
    import importlib, pathlib, time
    module = importlib.import_module(module)
    real, calls = getattr(module, name), []
    def paused(*arguments, **options):
        calls.append(name)
        if len(calls) == int(call):
            pathlib.Path(said).touch()
            time.sleep(60)
        return real(*arguments, **options)
    setattr(module, name, paused)
sys.argv[0] = "bigtrain"
from bigtrain.cli import main
try:
    main()
finally:
    peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
    print("peak", peak.split()[1], file=sys.stderr)
"""


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-c", WALLED, "consolidate", *map(str, arguments)]


def run_whole(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(*arguments), capture_output=True, text=True, timeout=120)


def interrupted(
    process: list[str],
    *,
    once: Callable[[], bool],
    cwd: Path | None = None,
    by: signal.Signals = signal.SIGINT,
) -> str:
    """Start it, interrupt it once that holds; what it said. It ends with 130 or, by SIGTERM, with
    143, not a traceback."""
    running = subprocess.Popen(
        process,
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # Shells have background jobs ignore it, and so would what this test starts.
        preexec_fn=lambda: signal.signal(by, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and running.poll() is None and not once():
        time.sleep(0.01)
    running.send_signal(by)
    _, shown = running.communicate(timeout=60)
    assert running.returncode == 128 + by, shown
    assert "Traceback" not in shown
    return shown


def make_source(path: Path, *, tensors: int = 3, each: int = 1000) -> dict[str, torch.Tensor]:
    path.mkdir(parents=True)
    state = {f"t{i}": torch.randn(each) for i in range(tensors)}
    save_file(state, path / "model.safetensors")
    (path / "config.json").write_text("{}")
    return state


def assert_holds(output: Path, state: dict[str, torch.Tensor]) -> None:
    ours = load_file(output / "model.safetensors")
    assert ours.keys() == state.keys()
    assert all(torch.equal(ours[name], value) for name, value in state.items())


def test_it_writes_the_model_and_says_what_it_did_without_torch_in_100_mb(tmp_path: Path) -> None:
    state = make_source(tmp_path / "in", tensors=40, each=MEGABYTE)

    done = run_whole(tmp_path / "in", tmp_path / "out", "--dtype", "fp16", "--verify")

    assert done.returncode == 0, done.stderr
    assert f"{tmp_path / 'out'}: 40 tensors, 83.89 MB in " in done.stdout
    assert "model.safetensors  83,8" in done.stdout
    assert "xxh3 " in done.stdout
    assert "output: on the disk, read back and compared" in done.stdout
    assert_holds(tmp_path / "out", {name: value.half() for name, value in state.items()})
    assert int(done.stderr.split("peak ")[1]) < 100_000


def test_json_is_one_document_with_the_checksums(tmp_path: Path) -> None:
    make_source(tmp_path / "in")

    done = run_whole(tmp_path / "in", tmp_path / "out", "--json", "--max-shard-size", "8KB")

    document = json.loads(done.stdout)
    assert document["num_tensors"] == 3
    assert [file["name"] for file in document["files"]] == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    ]
    assert all(len(file["xxh3"]) == 32 for file in document["files"])


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["nowhere", "out"], 4, "error: nowhere does not exist"),
        (["in", "full"], 4, "error: full is there already, and nothing is overwritten; give"),
        (["in", "in/out"], 2, "error: in/out is in itself or lies inside it"),
        (["in", "in"], 2, "error: in is in itself or lies inside it"),
        (["in", "out", "--dtype", "int8"], 2, "error: dtype is 'int8'; it must be keep, fp32"),
        (["in", "out", "--weights", "ema"], 4, "error: in has no weights named 'ema'; it has:"),
        (["in", "out", "--step", "4"], 4, "error: in holds no checkpoint that is known here"),
        (["in", "out", "--max-shard-size", "x"], 2, "error: max_shard_size is 'x'; write it as"),
    ],
)
def test_bad_requests_end_in_one_message(
    arguments: list[str],
    code: int,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from bigtrain.cli import main

    monkeypatch.chdir(tmp_path)
    make_source(Path("in"))
    Path("full").mkdir()
    Path("full/mine.txt").write_text("keep")
    monkeypatch.setattr(sys, "argv", ["bigtrain", "consolidate", *arguments])

    with pytest.raises(SystemExit) as ended:
        main()

    shown = capsys.readouterr().err
    assert ended.value.code == code
    assert shown.startswith(message)
    assert "Traceback" not in shown
    assert not Path("out").exists()


def test_a_fault_is_json_when_that_was_asked_for(tmp_path: Path) -> None:
    done = run_whole(tmp_path / "none", tmp_path / "out", "--json")
    assert done.returncode == 4
    assert "does not exist" in json.loads(done.stdout)["text"]


@pytest.mark.parametrize("by", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_it_says_how_to_go_on_and_does(by: signal.Signals, tmp_path: Path) -> None:
    state = make_source(tmp_path / "in", tensors=30, each=MEGABYTE)
    places = (tmp_path / "in", tmp_path / "out")
    journal = tmp_path / "out.partial" / "journal.jsonl"
    shown = interrupted(
        command(*places, "--slowly"),
        once=lambda: journal.exists() and len(journal.read_text().splitlines()) > 4,
        by=by,
    )

    assert f"interrupted; {tmp_path / 'out.partial'} is kept: go on with --resume" in shown
    assert not (tmp_path / "out").exists()
    assert len(journal.read_text().splitlines()) < 30
    again = run_whole(*places, "--resume")
    assert again.returncode == 0, again.stderr
    assert_holds(tmp_path / "out", state)
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize("before", [signal.SIG_DFL, signal.SIG_IGN, lambda *_: None])
def test_what_hears_sigterm_is_as_before_when_it_has_ended(
    before: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bigtrain.checkpoint import consolidate
    from bigtrain.checkpoint.consolidate_command import consolidate as command

    make_source(tmp_path / "in")
    during: list[Any] = []
    real = consolidate.carry_out

    def watched(request: consolidate.Request) -> consolidate.Summary:
        during.append(signal.getsignal(signal.SIGTERM))
        return real(request)

    monkeypatch.setattr(consolidate, "carry_out", watched)
    first = signal.signal(signal.SIGTERM, before)
    try:
        command(tmp_path / "in", tmp_path / "out")
        assert signal.getsignal(signal.SIGTERM) is before
    finally:
        signal.signal(signal.SIGTERM, first)
    assert (during[0] is before) == (before is signal.SIG_IGN)


INSIDE = "bigtrain.checkpoint.consolidate."


@pytest.mark.parametrize(
    ("function", "call", "message"),
    [
        ("run.open_source", 1, "interrupted\n"),
        ("workers._raise_damage", 1, "interrupted; {out}.partial is kept: go on with --resume\n"),
        ("run.read_back", 1, "interrupted; {out}.partial is kept: go on with --resume\n"),
        ("journal.sync_directory", 1, "interrupted; {out}.partial is kept: go on with --resume\n"),
        ("journal.sync_directory", 2, "interrupted, but {out} is whole\n"),
    ],
)
def test_interrupted_at_any_stage_it_leaves_nothing_half_done_under_the_outputs_name(
    function: str, call: int, message: str, tmp_path: Path
) -> None:
    state = make_source(tmp_path / "in")
    out, paused = tmp_path / "out", tmp_path / "paused"
    module, _, name = function.rpartition(".")
    pause = ("--pause", INSIDE + module, name, call, paused)
    shown = interrupted(command(tmp_path / "in", out, "--verify", *pause), once=paused.exists)

    assert shown.partition("peak ")[0].endswith(message.format(out=out)), shown
    assert out.exists() == ("whole" in message)
    assert (tmp_path / "out.partial").exists() == ("partial" in message)
    if not out.exists():
        again = run_whole(tmp_path / "in", out, "--resume", "--verify")
        assert again.returncode == 0, again.stderr
    assert_holds(out, state)


def test_the_directory_one_is_in_can_be_interrupted_too(tmp_path: Path) -> None:
    make_source(tmp_path / "in")
    (tmp_path / "here").mkdir()
    paused = tmp_path / "paused"
    pause = ("--pause", INSIDE + "run", "read_back", 1, paused)
    shown = interrupted(
        command(tmp_path / "in", ".", "--verify", *pause),
        once=paused.exists,
        cwd=tmp_path / "here",
    )
    assert f"interrupted; {tmp_path / 'here.partial'} is kept" in shown


def test_a_terminal_shows_speed_and_time_left(tmp_path: Path) -> None:
    make_source(tmp_path / "in", tensors=4, each=MEGABYTE)
    controller, terminal = pty.openpty()
    running = subprocess.Popen(
        command(tmp_path / "in", tmp_path / "out", "--slowly"),
        stdout=subprocess.PIPE,
        stderr=terminal,
    )
    os.close(terminal)
    shown = b""
    while True:
        try:
            data = os.read(controller, 65536)
        except OSError:  # the other end is closed
            break
        if not data:
            break
        shown += data
    running.communicate(timeout=60)
    os.close(controller)
    assert running.returncode == 0
    assert "MB/s" in shown.decode()
    assert "left" in shown.decode()


def test_a_runs_directory_gives_its_newest_step_rather_than_the_model_beside_it(
    tmp_path: Path,
) -> None:
    make_source(tmp_path / "run")
    older = make_source(tmp_path / "run" / "checkpoint-9")
    newer = make_source(tmp_path / "run" / "checkpoint-10")

    assert run_whole(tmp_path / "run", tmp_path / "newest").returncode == 0
    assert run_whole(tmp_path / "run", tmp_path / "chosen", "--step", "9").returncode == 0

    assert_holds(tmp_path / "newest", newer)
    assert_holds(tmp_path / "chosen", older)


def test_it_is_a_function_of_the_package_too(tmp_path: Path) -> None:
    import bigtrain

    state = make_source(tmp_path / "in")
    summary = bigtrain.consolidate(tmp_path / "in", tmp_path / "out", dtype="fp32")
    assert summary.tensors == 3
    assert_holds(tmp_path / "out", state)
