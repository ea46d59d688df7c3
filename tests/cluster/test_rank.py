"""A rank is, for all that a script can tell, the process that `python script.py` starts."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

PROBE = """
    '''A docstring.'''
    import json, os, signal, sys, threading
    import multiprocessing
    import sibling

    facts = {
        "argv": sys.argv,
        "path": sys.path,
        "orig_argv": sys.orig_argv[1:],
        "names": sorted(n for n in globals() if n != "facts"),
        "doc": __doc__,
        "name": __name__,
        "file": __file__,
        "spec": __spec__,
        "package": __package__,
        "builtins": type(__builtins__).__name__,
        "loader": type(__loader__).__name__,
        "main": sys.modules["__main__"].__dict__ is globals(),
        "mp_main": sys.modules["__mp_main__"].__dict__ is globals(),
        "sibling": sibling.__file__,
        "cwd": os.getcwd(),
        "signals": {
            n: str(signal.getsignal(n)).split(" at ")[0]
            for n in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR2", "SIGHUP", "SIGCHLD", "SIGPIPE")
            for n in [getattr(signal, n)]
        },
        "blocked": sorted(signal.pthread_sigmask(signal.SIG_BLOCK, [])),
        "wakeup": signal.set_wakeup_fd(-1),
        "start_method": multiprocessing.get_start_method(allow_none=True),
        "process": multiprocessing.current_process().name,
        "main_thread": threading.current_thread() is threading.main_thread(),
        "threads": threading.active_count(),
        "stdin": sys.stdin.read(),
        "encodings": [(s.encoding, s.errors) for s in (sys.stdin, sys.stdout, sys.stderr)],
        "flags": str(sys.flags),
        "umask": os.umask(0o22),
        "leader": os.getpid() == os.getpgid(0) or "plain",
    }
    with open(sys.argv[1], "w") as file:
        json.dump(facts, file, default=str)
"""


def test_a_script_sees_what_it_sees_without_a_launcher(
    launcher: Any, start: dict[str, Any]
) -> None:
    script = launcher.script(PROBE, "place/probe.py")
    launcher.script("", "place/sibling.py")
    launcher.script("raise SystemExit('the working directory is not on the path')", "json.py")
    facts = []
    plain = launcher.folder / "plain.json"
    command = [sys.executable, str(script), str(plain), "--flag", "a b"]
    subprocess.run(
        command,
        cwd=launcher.folder,
        env=launcher.environment(),
        stdin=subprocess.DEVNULL,
        check=True,
    )
    ranked = launcher.folder / "ranked.json"
    done = launcher.run(script, script_args=[str(ranked), "--flag", "a b"], **start)
    assert done.code == 0, done.err
    for path in (plain, ranked):
        facts.append(json.loads(path.read_text().replace(str(path), "FACTS")))
    if start["start_method"] == "fresh":  # how the interpreter was called, which it can't hide
        facts[0]["orig_argv"] = facts[1]["orig_argv"]
    facts[0]["leader"] = True
    assert facts[1] == facts[0]


def test_every_rank_draws_its_own_random_numbers(launcher: Any, gloo: dict[str, Any]) -> None:
    done = launcher.run(
        """
        import os, random
        import numpy.random, torch
        with open(f"draws-{os.environ['RANK']}", "w") as file:
            print(random.random(), numpy.random.random(), torch.rand(1).item(), file=file)
        """,
        procs=2,
        start_method=gloo["start_method"],
        preload=["torch", "numpy.random", "random"],
    )
    assert done.code == 0, done.err
    first, second = ((launcher.folder / f"draws-{r}").read_text().split() for r in (0, 1))
    assert all(a != b for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize(
    ("ending", "code"),
    [
        ("pass", 0),
        ("sys.exit(7)", 7),
        ("sys.exit('a message')", 1),
        ("os._exit(9)", 9),
        ("raise ValueError('no')", 1),
        ("os.kill(os.getpid(), signal.SIGSEGV)", 139),
        ("raise KeyboardInterrupt", 130),
        ("threading.Thread(target=lambda: (time.sleep(0.3), print('thread done'))).start()", 0),
    ],
)
def test_the_exit_code_is_the_one_of_plain_python(
    launcher: Any, start: dict[str, Any], ending: str, code: int
) -> None:
    script = launcher.script(f"import os, signal, sys, threading, time\n{ending}\n")
    plain = subprocess.run([sys.executable, str(script)], check=False, capture_output=True)
    assert (plain.returncode if plain.returncode >= 0 else 128 - plain.returncode) == code
    done = launcher.run(script, **start)
    assert done.code == code
    if "thread done" in ending:
        assert "thread done" in done.out


def test_exit_handlers_run_and_buffers_are_flushed(launcher: Any, start: dict[str, Any]) -> None:
    done = launcher.run(
        """
        import atexit, sys
        atexit.register(print, "second", end="")
        atexit.register(print, "first")
        held = open("held.txt", "w")
        held.write("all of it")
        sys.stdout.write("no newline at the end")
        """,
        **start,
    )
    assert done.code == 0
    assert done.out == "no newline at the endfirst\nsecond"
    assert (launcher.folder / "held.txt").read_text() == "all of it"


def test_a_class_of_main_is_pickled_and_found_by_workers_of_either_kind(
    launcher: Any, gloo: dict[str, Any]
) -> None:
    done = launcher.run(
        """
        import pickle
        import torch
        from torch.utils.data import DataLoader, Dataset

        class Squares(Dataset):
            def __len__(self):
                return 8
            def __getitem__(self, index):
                return torch.tensor(index * index)

        if __name__ == "__main__":
            again = pickle.loads(pickle.dumps(Squares()))
            assert type(again) is Squares
            for context in (None, "fork", "spawn"):
                loader = DataLoader(again, 4, num_workers=2, multiprocessing_context=context)
                assert torch.cat(list(loader)).tolist() == [i * i for i in range(8)], context
            print("all found")
        """,
        procs=2,
        **gloo,
    )
    assert done.code == 0, done.err + done.rank_log(0)
    # On a busy machine multiprocessing's own tracker may have a word to say after it.
    assert done.out.startswith("all found\n")


def test_many_threads_compute_in_a_forked_rank(launcher: Any, gloo: dict[str, Any]) -> None:
    done = launcher.run(
        """
        import os
        import numpy as np, torch
        assert torch.get_num_threads() == 2 == int(os.environ["OMP_NUM_THREADS"])
        a = torch.rand(300, 300, requires_grad=True)
        (a @ a).sum().backward()
        np.linalg.svd(np.random.rand(200, 200))
        print("computed")
        """,
        **{**gloo, "environment": {"OMP_NUM_THREADS": "2"}},
    )
    assert done.code == 0, done.err
    assert done.out == "computed\n"


def test_variables_are_there_before_the_first_import(launcher: Any, start: dict[str, Any]) -> None:
    launcher.script("import os\nSEEN = os.environ['READ_AT_IMPORT']\n", "early.py")
    done = launcher.run(
        "import early, os; print(early.SEEN, os.environ['RANK'], os.environ['MASTER_ADDR'])",
        preload=["early"],
        environment={"READ_AT_IMPORT": "from the plan"},
        **start,
    )
    assert done.out == "from the plan 0 127.0.0.1\n"


def test_any_script_joins_its_process_group(launcher: Any, gloo: dict[str, Any]) -> None:
    done = launcher.run(
        """
        import torch, torch.distributed as dist
        dist.init_process_group("gloo")
        total = torch.tensor(float(dist.get_rank() + 1))
        dist.all_reduce(total)
        print("total", total.item())
        dist.destroy_process_group()
        """,
        procs=2,
        **gloo,
    )
    assert (done.code, done.out) == (0, "total 3.0\n"), done.err
    assert "total 3.0" in done.rank_log(1)
    assert (done.logs / "store.log").read_text() == ""
    assert len(done.err.splitlines()) == 1  # the launcher's own line, and nobody's goodbyes


def test_a_preload_that_fails_is_left_to_the_script(launcher: Any, start: dict[str, Any]) -> None:
    done = launcher.run(
        """
        try:
            import no_such_module
        except ImportError:
            print("did without")
        """,
        preload=["no_such_module"],
        **start,
    )
    assert (done.code, done.out) == (0, "did without\n")


def test_a_program_started_by_a_rank_can_not_write_into_the_event_pipe(
    launcher: Any, start: dict[str, Any]
) -> None:
    done = launcher.run(
        """
        import os, subprocess, sys
        from bigtrain.cluster import events
        events.emit("notice", text="from the rank")
        number = os.environ["BIGTRAIN_EVENT_FD"].partition(":")[0]
        child = (
            "import os; from bigtrain.cluster import events\\n"
            f"os.dup2(os.open('other', os.O_CREAT | os.O_WRONLY), {number})\\n"
            "events.emit('notice', text='from elsewhere')"
        )
        subprocess.run([sys.executable, "-c", child], check=True)
        """,
        **start,
    )
    assert (done.code, done.out) == (0, "from the rank\n"), done.err
    assert (launcher.folder / "other").read_text() == ""
