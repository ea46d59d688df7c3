"""Runs one function on several ranks: forked from this process, joined over gloo.

The ranks share this process's imports, so that a world costs a fraction of a second. Nothing in
this process may have started threads that matter to torch before it forks.
"""

from __future__ import annotations

import os
import pickle
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bigtrain.engine import process_group
from bigtrain.topology import RankInfo

DEADLINE_S = 180


def run_ranks(world_size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What `function(world, *arguments)` returned on each rank. A rank's failure fails it all."""
    with tempfile.TemporaryDirectory() as folder:
        port = _free_port()
        pids = [
            _fork(rank, world_size, port, Path(folder), function, arguments)
            for rank in range(world_size)
        ]
        codes = _wait(pids)
        results = [_read_result(Path(folder) / f"{rank}") for rank in range(world_size)]
    errors = [str(result) for result in results if isinstance(result, RankError)]
    if errors or any(codes):
        raise AssertionError(f"exit codes {codes}\n" + "\n".join(errors))
    return results


class RankError(Exception):
    """A rank's traceback."""


def _fork(
    rank: int,
    world_size: int,
    port: int,
    folder: Path,
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> int:
    sys.stdout.flush()
    sys.stderr.flush()
    if pid := os.fork():
        return pid
    code = 1
    try:
        code = _rank_main(rank, world_size, port, folder, function, arguments)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _rank_main(
    rank: int,
    world_size: int,
    port: int,
    folder: Path,
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> int:
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "GLOO_SOCKET_IFNAME": "lo",
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "DS_ACCELERATOR": "cpu",
    }
    torch.set_num_threads(1)
    world = RankInfo(
        rank=rank,
        local_rank=rank,
        world_size=world_size,
        local_world_size=world_size,
        source="test",
    )
    result: Any
    try:
        process_group.join(world, device=torch.device("cpu"), timeout_s=60)
        result, code = function(world, *arguments), 0
    except BaseException:
        result, code = RankError(f"rank {rank}:\n{traceback.format_exc()}"), 1
    (folder / f"{rank}").write_bytes(pickle.dumps(result))
    if code == 0:
        process_group.leave()
    return code


def _wait(pids: list[int]) -> list[int]:
    """Exit codes; after the first failure, or when time is up, the others are ended."""
    codes: dict[int, int] = {}
    give_up = time.monotonic() + DEADLINE_S
    while len(codes) < len(pids):
        for pid in set(pids) - codes.keys():
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                codes[pid] = os.waitstatus_to_exitcode(status)
                if codes[pid]:
                    give_up = min(give_up, time.monotonic() + 5)
        if time.monotonic() > give_up:
            for pid in set(pids) - codes.keys():
                os.kill(pid, 9)
            give_up = float("inf")
        time.sleep(0.01)
    return [codes[pid] for pid in pids]


def _read_result(path: Path) -> Any:
    return pickle.loads(path.read_bytes()) if path.exists() else RankError(f"rank {path.name} died")


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
