"""One run writes to an output directory at a time, and a dead one keeps nobody out."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
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
    path = folder / lease.LEASE
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
    os.utime(tmp_path / lease.LEASE, (long_ago, long_ago))
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
    (tmp_path / lease.LEASE).unlink()
    second = lease.take(tmp_path)
    with pytest.raises(CheckpointError, match="was taken over by process"):
        first.check()
    first.release()
    second.check()
    second.release()


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"pid": "x"}', b"\xff"])
def test_what_can_not_be_read_holds_nothing(tmp_path: Path, content: bytes) -> None:
    (tmp_path / lease.LEASE).write_bytes(content)
    assert lease.living_holder(tmp_path) is None
    lease.take(tmp_path).release()


def race(folder: Path, barrier: Any, results: Any) -> None:
    barrier.wait()
    try:
        lease.take(folder)
    except CheckpointError:
        results.put(0)
    else:
        results.put(1)
    barrier.wait()


@pytest.mark.parametrize("leaves_a_dead_one", [False, True])
def test_of_many_at_once_one_gets_it(
    tmp_path: Path, holder: subprocess.Popen[str], leaves_a_dead_one: bool
) -> None:
    holder.kill()
    holder.wait()
    if not leaves_a_dead_one:
        (tmp_path / lease.LEASE).unlink()
    fork = multiprocessing.get_context("fork")
    barrier, results = fork.Barrier(6), fork.Queue()
    racers = [fork.Process(target=race, args=(tmp_path, barrier, results)) for _ in range(6)]
    for racer in racers:
        racer.start()
    assert sum(results.get(timeout=30) for _ in racers) == 1
    for racer in racers:
        racer.join(30)
    assert names(tmp_path) == [lease.LEASE]
