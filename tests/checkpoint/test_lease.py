"""One run writes to an output directory at a time, and a dead one keeps nobody out."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bigtrain.checkpoint import lease
from bigtrain.errors import CheckpointError

HOLD = """
import sys, time
from pathlib import Path
from bigtrain.checkpoint import lease
lease.BEAT_S = 0.05
lease.take(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def pretend_elsewhere(folder: Path) -> lease.Holder:
    """The holder is on another machine now, whose processes can't be looked up."""
    (path,) = (folder / lease.LEASE).iterdir()
    found = lease.Holder(**json.loads(path.read_text()))
    moved = dataclasses.replace(found, host="elsewhere", machine="elsewhere")
    path.write_text(json.dumps(dataclasses.asdict(moved)))
    return moved


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_second_one_is_refused_until_the_first_lets_go(
    tmp_path: Path, holder: subprocess.Popen[str]
) -> None:
    with pytest.raises(CheckpointError) as refusal:
        lease.take(tmp_path)
    assert f"{tmp_path} is being written to by another run (process {holder.pid} on " in str(
        refusal.value
    )
    assert names(tmp_path) == [lease.LEASE]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_one_who_is_dead_keeps_nobody_out(
    tmp_path: Path, holder: subprocess.Popen[str], number: signal.Signals
) -> None:
    holder.send_signal(number)
    holder.wait()
    held = lease.take(tmp_path)
    held.check()
    held.release()
    held.release()
    assert names(tmp_path) == []


def test_one_who_has_ended_and_was_not_waited_for_is_dead(
    tmp_path: Path, holder: subprocess.Popen[str]
) -> None:
    holder.kill()
    os.waitid(os.P_PID, holder.pid, os.WEXITED | os.WNOWAIT)
    lease.take(tmp_path).release()


def test_one_of_another_machine_lives_while_he_touches_it(
    tmp_path: Path, holder: subprocess.Popen[str]
) -> None:
    pretend_elsewhere(tmp_path)
    with pytest.raises(CheckpointError, match=r"process \d+ on elsewhere"):
        lease.take(tmp_path)
    found = lease.living_holder(tmp_path)
    assert found is not None
    assert found.host == "elsewhere"


def test_one_of_another_machine_who_has_died_is_waited_for_no_longer_than_said(
    tmp_path: Path, holder: subprocess.Popen[str]
) -> None:
    holder.kill()
    holder.wait()
    dead = pretend_elsewhere(tmp_path)
    started = time.monotonic()
    assert not lease.is_alive(tmp_path, dead, patience_s=1.0)
    assert time.monotonic() - started >= 0.5
    # By the clock of the file system he died long ago: nobody waits.
    long_ago = time.time() - 2 * lease.PATIENCE_S
    os.utime(tmp_path / lease.LEASE / f"{dead.token}.json", (long_ago, long_ago))
    slept: list[float] = []
    assert not lease.is_alive(tmp_path, dead, sleep=slept.append)
    assert slept == []
    lease.take(tmp_path).release()


def test_a_launch_that_starts_its_ranks_again_waits_for_nobody(tmp_path: Path) -> None:
    lease.take(tmp_path, launch="a 1")
    pretend_elsewhere(tmp_path)
    held = lease.take(tmp_path, launch="a 1", is_restarted=True)
    held.check()
    held.release()


def test_who_was_taken_for_dead_writes_no_more(tmp_path: Path) -> None:
    first = lease.take(tmp_path)
    first.check()
    shutil.rmtree(tmp_path / lease.LEASE)
    second = lease.take(tmp_path)
    with pytest.raises(CheckpointError, match="was taken over by process"):
        first.check()
    first.release()
    second.check()
    second.release()


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"pid": "x"}', b"\xff"])
def test_what_can_not_be_read_holds_nothing(tmp_path: Path, content: bytes) -> None:
    (tmp_path / lease.LEASE).mkdir()
    (tmp_path / lease.LEASE / "cut.json").write_bytes(content)
    assert lease.living_holder(tmp_path) is None
    lease.take(tmp_path).release()


def test_what_is_said_of_a_lease_is_not_believed_beyond_its_own_file(tmp_path: Path) -> None:
    held = lease.take(tmp_path / "run")
    (mine,) = (tmp_path / "run" / lease.LEASE).iterdir()
    victim = tmp_path / "victim.json"
    victim.write_text("kept")
    content = json.loads(mine.read_text()) | {"token": "../../victim", "pid": 0}
    held.release()
    (tmp_path / "run" / lease.LEASE).mkdir()
    mine.write_text(json.dumps(content))
    lease.take(tmp_path / "run").release()
    assert victim.read_text() == "kept"


def test_who_acts_late_on_a_dead_one_takes_nothing_from_who_came_first(
    tmp_path: Path, holder: subprocess.Popen[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    holder.kill()
    holder.wait()
    first: list[subprocess.Popen[str]] = []

    def while_he_looks(*args: Any, **kwargs: Any) -> bool:
        is_first = not first
        if is_first:
            taker = subprocess.Popen(
                [sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True
            )
            assert taker.stdout is not None
            assert taker.stdout.readline() == "held\n"
            first.append(taker)
        return not is_first

    monkeypatch.setattr(lease, "is_alive", while_he_looks)
    with pytest.raises(CheckpointError, match=r"another run \(process "):
        lease.take(tmp_path)
    found = lease.living_holder(tmp_path)
    assert found is not None
    assert found.pid == first[0].pid
    first[0].kill()
    first[0].communicate()


def race(folder: Path, barrier: Any, results: Any) -> None:
    for turn in range(TURNS):
        barrier.wait()
        try:
            lease.take(folder / str(turn))
        except CheckpointError:
            results.put((turn, 0))
        else:
            results.put((turn, 1))
    barrier.wait()  # nobody has ended before all have tried


TURNS = 40


@pytest.mark.parametrize("leaves_a_dead_one", [False, True])
def test_of_many_at_once_one_gets_it(
    tmp_path: Path, holder: subprocess.Popen[str], leaves_a_dead_one: bool
) -> None:
    holder.kill()
    holder.wait()
    for turn in range(TURNS):
        (tmp_path / str(turn)).mkdir()
        if leaves_a_dead_one:
            shutil.copytree(tmp_path / lease.LEASE, tmp_path / str(turn) / lease.LEASE)
    fork = multiprocessing.get_context("fork")
    barrier, results = fork.Barrier(6), fork.Queue()
    racers = [fork.Process(target=race, args=(tmp_path, barrier, results)) for _ in range(6)]
    for racer in racers:
        racer.start()
    winners = [0] * TURNS
    for _ in range(6 * TURNS):
        turn, won = results.get(timeout=120)
        winners[turn] += won
    assert winners == [1] * TURNS
    for racer in racers:
        racer.join(60)
    assert all(names(tmp_path / str(turn)) == [lease.LEASE] for turn in range(TURNS))


def churn(folder: Path, owned: Path, rounds: int, results: Any) -> None:
    """Take and let go, over and over; while it is held nobody else may have the file `owned`."""
    taken = 0
    for _ in range(rounds):
        try:
            held = lease.take(folder)
        except CheckpointError:
            continue
        os.close(os.open(owned, os.O_CREAT | os.O_EXCL))
        taken += 1
        owned.unlink()
        held.release()
    results.put(taken)


def test_while_many_take_and_let_go_never_two_hold_it(tmp_path: Path) -> None:
    fork = multiprocessing.get_context("fork")
    results = fork.Queue()
    arguments = (tmp_path / "run", tmp_path / "owned", 150, results)
    churners = [fork.Process(target=churn, args=arguments) for _ in range(4)]
    for churner in churners:
        churner.start()
    for churner in churners:
        churner.join(120)
    assert [churner.exitcode for churner in churners] == [0] * 4
    assert sum(results.get(timeout=5) for _ in churners) >= 150
    assert names(tmp_path / "run") == []
