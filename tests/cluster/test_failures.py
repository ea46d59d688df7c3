"""A rank that ends badly ends the run: with its own code, its own words, and nothing left."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from typing import Any

import pytest

from bigtrain.cluster.supervisor import LINGER_S

_STUCK_BESIDE_A_FAILURE = """
    import os, sys, time
    import torch, torch.distributed as dist
    dist.init_process_group("gloo")
    open(f"pid-{os.environ['RANK']}", "w").write(str(os.getpid()))
    dist.barrier()
    if dist.get_rank() == 1:
        FAIL
    dist.all_reduce(torch.ones(1))
"""


def test_the_message_names_rank_host_and_log_and_shows_its_own_traceback(
    launcher: Any, gloo: dict[str, Any]
) -> None:
    script = _STUCK_BESIDE_A_FAILURE.replace("FAIL", "raise ValueError('no such thing')")
    done = launcher.run(script, procs=3, **gloo)
    assert done.code == 1
    host = os.uname().nodename
    message = done.err.split("\n", 1)[1]
    assert message.startswith(f"rank 1 on {host} failed with exit code 1\n  Traceback (most recent")
    assert message.count("File ") == 1
    assert f'File "{launcher.folder}/script.py", line 8, in <module>\n' in message
    assert "  ValueError: no such thing\n" in message
    assert message.endswith(f"its log: {done.logs}/rank-00001.log\n")
    assert message.count("rank ") == 1
    # The log has the same traceback, as plain Python would print it: without the launcher's part.
    assert done.rank_log(1).count('File "') == 1
    report = json.loads((done.logs / "rank-00001.error.json").read_text())
    assert (report["rank"], report["host"], report["type"]) == (1, host, "ValueError")


@pytest.mark.parametrize(
    ("fail", "code", "words"),
    [
        ("sys.exit(7)", 7, "failed with exit code 7"),
        ("os._exit(3)", 3, "failed with exit code 3"),
        ("os.kill(os.getpid(), 9)", 137, "was killed by SIGKILL (often the kernel's out-of-mem"),
        ("os.kill(os.getpid(), 11)", 139, "was killed by SIGSEGV"),
    ],
)
def test_the_run_ends_with_the_failing_ranks_code(
    launcher: Any, gloo: dict[str, Any], fail: str, code: int, words: str
) -> None:
    done = launcher.run(_STUCK_BESIDE_A_FAILURE.replace("FAIL", fail), procs=2, **gloo)
    assert done.code == code, done.err
    assert re.search(rf"^rank 1 on \S+ {re.escape(words)}", done.err, re.MULTILINE), done.err


def test_a_users_mistake_is_its_message_alone_and_keeps_its_code(
    launcher: Any, start: dict[str, Any]
) -> None:
    done = launcher.run(
        """
        from bigtrain.errors import DataError
        raise DataError("there is no file corpus.txt (run.yaml:3: data.train_files)")
        """,
        **start,
    )
    assert done.code == 3
    assert "\n  there is no file corpus.txt (run.yaml:3: data.train_files)\nits log:" in done.err
    assert "Traceback" not in done.err + done.rank_log(0)


def test_a_syntax_error_is_shown_as_python_shows_it(launcher: Any, start: dict[str, Any]) -> None:
    done = launcher.run("x = = 1\n", **start)
    assert done.code == 1
    assert "    x = = 1\n" in done.err
    assert "SyntaxError: invalid syntax" in done.err
    assert "cluster/rank.py" not in done.err + done.rank_log(0)


def test_the_programs_own_exception_hook_is_called(launcher: Any, start: dict[str, Any]) -> None:
    done = launcher.run(
        """
        import sys
        sys.excepthook = lambda kind, error, trace: print("my hook:", error)
        raise RuntimeError("seen by both")
        """,
        **start,
    )
    assert done.code == 1
    assert done.out == "my hook: seen by both\n"
    assert "RuntimeError: seen by both" in done.err


def test_a_rank_that_fails_and_does_not_leave_is_killed(
    launcher: Any, start: dict[str, Any]
) -> None:
    script = """
        import os, threading, time
        if os.environ["RANK"] == "0":
            threading.Thread(target=time.sleep, args=(600,)).start()
            raise ValueError("and a thread that never ends")
        time.sleep(600)
    """
    done = launcher.start(script, procs=2, **start).wait(timeout_s=LINGER_S + 30)
    assert done.code == 1
    assert "ValueError: and a thread that never ends" in done.err


def test_nothing_that_a_failing_rank_started_is_left(
    launcher: Any, start: dict[str, Any], still_alive: Callable[..., list[int]]
) -> None:
    done = launcher.run(
        """
        import os, subprocess
        child = subprocess.Popen(["sleep", "600"])
        open("child", "w").write(str(child.pid))
        raise SystemExit(4)
        """,
        **start,
    )
    assert done.code == 4
    assert still_alive([int((launcher.folder / "child").read_text())]) == []


def test_all_ranks_start_again_without_another_import(launcher: Any, gloo: dict[str, Any]) -> None:
    done = launcher.run(
        """
        import os, torch, torch.distributed as dist
        dist.init_process_group("gloo")
        dist.all_reduce(torch.ones(1))
        tries = os.environ["BIGTRAIN_RESTART_COUNT"]
        assert os.environ["TORCHELASTIC_RESTART_COUNT"] == tries
        print("try", tries, flush=True)
        if tries != "2" and dist.get_rank() == 1:
            raise RuntimeError(f"on try {tries}")
        dist.barrier()
        dist.destroy_process_group()
        """,
        procs=2,
        max_restarts=3,
        **gloo,
    )
    assert done.code == 0, done.err
    assert re.findall("^try .", done.out, re.MULTILINE) == ["try 0", "try 1", "try 2"]
    assert "restarting all ranks (1 of 3)\n" in done.err
    assert "restarting all ranks (2 of 3)\n" in done.err
    assert done.agent_log().count("preload took") == 1
    assert not (done.logs / "rank-00001.error.json").exists()
    assert len(list(done.logs.glob("rank-00001.error.before-restart-*.json"))) == 2


def test_restarts_come_to_an_end(launcher: Any, start: dict[str, Any]) -> None:
    done = launcher.run("raise SystemExit(5)", max_restarts=1, **start)
    assert done.code == 5
    assert done.err.count("failed with exit code 5") == 2


def test_a_server_that_dies_is_replaced_at_the_next_restart(
    launcher: Any, wait_for: Callable[..., Any]
) -> None:
    launched = launcher.start(
        """
        import os, time
        if os.environ["BIGTRAIN_RESTART_COUNT"] == "0":
            while not os.path.exists("go"):
                time.sleep(0.05)
            raise SystemExit(5)
        print("second try")
        """,
        max_restarts=1,
    )
    server = wait_for(lambda: re.search(r"server is pid (\d+)", _text(launched, "agent.log")))
    wait_for(lambda: "started 1 rank" in _text(launched, "agent.log"))
    os.kill(int(server.group(1)), 9)
    (launcher.folder / "go").touch()
    done = launched.wait()
    assert (done.code, done.out) == (0, "second try\n"), done.err


def test_a_preload_that_kills_its_process_is_told(launcher: Any) -> None:
    launcher.script("import os, sys; print('oh no', file=sys.stderr); os._exit(3)", "deadly.py")
    done = launcher.run("pass", preload=["deadly"])
    assert done.code == 5
    assert "the process that starts the ranks died (exit code 3)\n  oh no\n" in done.err


def _text(launched: Any, name: str) -> str:
    paths = list(launched.output_dir.glob(f"logs/*/*/{name}"))
    return paths[0].read_text() if paths else ""
