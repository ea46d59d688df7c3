"""Signals to the agent reach every rank once, and nothing outlives the agent, however it ends."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

_NOTHING_SAVED = "no checkpoint was saved"
_HANDLES = """
    import os, signal, sys, time
    seen = []
    def handler(number, frame):
        seen.append(signal.Signals(number).name)
    signal.signal(signal.SIGNAME, handler)
    open(f"ready-{os.environ['RANK']}", "w").close()
    while not seen:
        time.sleep(0.05)
    time.sleep(0.5)
    open(f"seen-{os.environ['RANK']}", "w").write(" ".join(seen))
    sys.exit(CODE)
"""
_SLEEPS = """
    import os, time
    open(f"ready-{os.environ['RANK']}", "w").close()
    time.sleep(600)
"""
_BLOCKED = """
    import os, sys, time
    import torch, torch.distributed as dist
    from torch.utils.data import DataLoader, Dataset

    class Slow(Dataset):
        def __len__(self):
            return 100
        def __getitem__(self, index):
            time.sleep(0.01 if index < 4 else 600)
            return index

    dist.init_process_group("gloo")
    next(iter(loader := iter(DataLoader(Slow(), 2, num_workers=2))))
    pids = [os.getpid(), *(worker.pid for worker in loader._workers)]
    open(f"partial-{os.environ['RANK']}", "w").write(" ".join(map(str, pids)))
    os.rename(f"partial-{os.environ['RANK']}", f"ready-{os.environ['RANK']}")
    if dist.get_rank() == 0:
        time.sleep(600)
    dist.all_reduce(torch.ones(1))
"""


@pytest.fixture
def wait_ready(launcher: Any, wait_for: Callable[..., Any]) -> Callable[[int], None]:
    def wait(procs: int) -> None:
        files = [launcher.folder / f"ready-{rank}" for rank in range(procs)]
        wait_for(lambda: all(file.exists() for file in files))

    return wait


@pytest.mark.parametrize(
    ("name", "code"), [("SIGTERM", 143), ("SIGUSR1", 85), ("SIGUSR2", 85), ("SIGHUP", 129)]
)
def test_a_signal_is_passed_on_once_and_the_ranks_answer_is_the_runs(
    launcher: Any, start: dict[str, Any], wait_ready: Any, name: str, code: int
) -> None:
    script = _HANDLES.replace("SIGNAME", name).replace("CODE", str(code))
    launched = launcher.start(script, procs=2, **start)
    wait_ready(2)
    os.kill(launched.process.pid, signal.Signals[name])
    done = launched.wait()
    assert done.code == code, done.err
    for rank in range(2):
        assert (launcher.folder / f"seen-{rank}").read_text() == name
    assert done.err.splitlines()[1:] == [f"stopped by {name}; {_NOTHING_SAVED}"]


def test_a_script_that_ignores_the_matter_dies_of_sigterm(
    launcher: Any, start: dict[str, Any], wait_ready: Any
) -> None:
    launched = launcher.start(_SLEEPS, procs=2, **start)
    wait_ready(2)
    launched.process.terminate()
    done = launched.wait(timeout_s=15)
    assert done.code == 143
    assert done.err.splitlines()[1:] == [f"stopped by SIGTERM; {_NOTHING_SAVED}"]


def test_a_script_that_dies_of_a_notice_is_to_be_run_again(
    launcher: Any, start: dict[str, Any], wait_ready: Any
) -> None:
    launched = launcher.start(_SLEEPS, procs=2, **start)
    wait_ready(2)
    launched.process.send_signal(signal.SIGUSR2)
    done = launched.wait(timeout_s=15)
    assert (done.code, done.err.splitlines()[1:]) == (
        85,
        [f"stopped by SIGUSR2; {_NOTHING_SAVED}"],
    )


def test_a_sigterm_after_a_notice_ends_it_for_good(
    launcher: Any, start: dict[str, Any], wait_ready: Any
) -> None:
    script = _HANDLES.replace("SIGNAME", "SIGUSR2").replace("CODE", "85")
    script = script.replace("seen = []", "seen = []; signal.signal(15, signal.SIG_IGN)")
    launched = launcher.start(script, procs=2, **start)
    wait_ready(2)
    launched.process.send_signal(signal.SIGUSR2)
    time.sleep(0.2)
    launched.process.send_signal(signal.SIGTERM)
    assert launched.wait(timeout_s=15).code == 143


def test_ranks_have_as_long_to_save_as_was_said(
    launcher: Any, start: dict[str, Any], wait_ready: Any
) -> None:
    script = "import signal\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
    script += _SLEEPS.replace("    ", "")
    launched = launcher.start(script, procs=2, stop_grace_s=1, **start)
    wait_ready(2)
    launched.process.send_signal(signal.SIGTERM)
    done = launched.wait(timeout_s=15)
    assert done.code == 143
    why = "still there 1 s after the signal to stop (cluster.stop_grace_s)"
    assert f"killing rank 0, 1: {why}\n" in done.err


def test_ctrl_c_ends_all_ranks_with_130_and_calm_words(
    launcher: Any, gloo: dict[str, Any], wait_ready: Any
) -> None:
    launched = launcher.start(_SLEEPS, procs=2, **gloo)
    wait_ready(2)
    os.killpg(launched.process.pid, signal.SIGINT)  # as a terminal sends it: to the whole group
    done = launched.wait(timeout_s=15)
    assert done.code == 130
    assert done.err.splitlines()[1:] == [
        "interrupted: the ranks stop without a save (Ctrl-C again: kill them)",
        f"stopped by SIGINT; {_NOTHING_SAVED}",
    ]
    assert done.rank_log(1).count("KeyboardInterrupt") == 1


def test_a_second_ctrl_c_kills(launcher: Any, start: dict[str, Any], wait_ready: Any) -> None:
    launched = launcher.start(
        "import signal\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        + _SLEEPS.replace("    ", ""),
        procs=2,
        **start,
    )
    wait_ready(2)
    launched.process.send_signal(signal.SIGINT)
    time.sleep(1.0)
    assert launched.process.poll() is None
    launched.process.send_signal(signal.SIGINT)
    done = launched.wait(timeout_s=10)
    assert done.code == 130
    assert "killing rank 0, 1: interrupted twice\n" in done.err


def test_what_peers_raise_after_ctrl_c_is_no_failure(
    launcher: Any, gloo: dict[str, Any], wait_ready: Any
) -> None:
    script = """
        import os, time, torch, torch.distributed as dist
        dist.init_process_group("gloo")
        dist.barrier()
        open(f"ready-{os.environ['RANK']}", "w").close()
        if dist.get_rank() == 0:
            time.sleep(600)
        dist.all_reduce(torch.ones(1))
    """
    launched = launcher.start(script, procs=2, **gloo)
    wait_ready(2)
    time.sleep(0.5)
    launched.process.send_signal(signal.SIGINT)
    done = launched.wait(timeout_s=25)
    assert done.code == 130, done.err
    assert "failed" not in done.err


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGUSR1", 85)])
def test_a_signal_during_the_import_ends_the_launch_at_once(
    launcher: Any, wait_for: Callable[..., Any], name: str, code: int
) -> None:
    launcher.script("import time; open('importing', 'w').close(); time.sleep(600)", "slow.py")
    launched = launcher.start("pass", preload=["slow"])
    wait_for((launcher.folder / "importing").exists)
    launched.process.send_signal(signal.Signals[name])
    done = launched.wait(timeout_s=10)
    assert done.code == code
    assert f"stopped by {name} before the ranks were started" in done.err


def test_nothing_lives_after_the_agent_is_killed(
    launcher: Any,
    gloo: dict[str, Any],
    wait_ready: Any,
    wait_for: Callable[..., Any],
    still_alive: Callable[..., list[int]],
) -> None:
    launched = launcher.start(_BLOCKED, procs=2, **gloo)
    wait_ready(2)
    children = [p.pid for p in psutil.Process(launched.process.pid).children(recursive=True)]
    written = [int(n) for rank in (0, 1) for n in _words(launcher.folder / f"ready-{rank}")]
    assert len(written) == 6
    assert set(written) < set(children)  # and the server and the store
    launched.process.kill()
    wait_for(lambda: not still_alive(children), timeout_s=5.0)


def test_nothing_lives_after_the_agent_is_killed_during_the_import(
    launcher: Any, wait_for: Callable[..., Any], still_alive: Callable[..., list[int]]
) -> None:
    launcher.script("import time; open('importing', 'w').close(); time.sleep(600)", "slow.py")
    launched = launcher.start("pass", preload=["slow"])
    wait_for((launcher.folder / "importing").exists)
    (server,) = psutil.Process(launched.process.pid).children()
    launched.process.kill()
    wait_for(lambda: not still_alive([server.pid]), timeout_s=5.0)


def test_ranks_die_with_the_agent_even_without_the_server(
    launcher: Any,
    gloo: dict[str, Any],
    wait_ready: Any,
    wait_for: Callable[..., Any],
    still_alive: Callable[..., list[int]],
) -> None:
    launched = launcher.start(_SLEEPS, procs=2, **gloo)
    wait_ready(2)
    children = psutil.Process(launched.process.pid).children()
    (server,) = (p for p in children if "fork_server" in " ".join(p.cmdline()) and _is_leader(p))
    server.kill()
    launched.process.kill()
    wait_for(lambda: not still_alive([p.pid for p in children]), timeout_s=5.0)


def _is_leader(process: psutil.Process) -> bool:
    return os.getsid(process.pid) == process.pid


def _words(path: Path) -> list[str]:
    return path.read_text().split()


def test_a_stop_names_the_checkpoint_that_the_run_itself_has_saved(
    launcher: Any, wait_ready: Any
) -> None:
    launched = launcher.start(
        """
        import time
        from bigtrain.cluster import events
        print("before")
        events.emit("saved", path="elsewhere/checkpoint-7", step=7)
        open("ready-0", "w").close()
        time.sleep(600)
        """
    )
    wait_ready(1)
    launched.process.send_signal(signal.SIGINT)
    done = launched.wait(timeout_s=20)
    assert done.code == 130
    assert done.err.splitlines()[-1] == (
        "stopped by SIGINT; go on from elsewhere/checkpoint-7 with --resume auto"
    )
    assert "before" in done.out and "KeyboardInterrupt" not in done.out
