from __future__ import annotations

from pathlib import Path

from bigtrain.cluster.follow import LogFollower


def _follow(path: Path) -> tuple[LogFollower, list[bytes]]:
    shown: list[bytes] = []
    return LogFollower(path, show=shown.append), shown


def test_only_what_comes_later_is_shown(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_bytes(b"before a restart\n")
    follower, shown = _follow(path)
    with path.open("ab") as file:
        file.write(b"after\n")
    follower.close()
    assert b"".join(shown) == b"after\n"


def test_a_progress_bar_is_shown_a_poll_later_byte_for_byte(tmp_path: Path) -> None:
    path = tmp_path / "log"
    follower, shown = _follow(path)
    with path.open("ab", buffering=0) as file:
        file.write(b"one\n 10%|#   |\r 20%|##")
        follower.poll()
        assert shown == [b"one\n"]
        follower.poll()
        assert shown[1:] == [b" 10%|#   |\r 20%|##"]
        file.write(b"##\xff\n")
        follower.poll()
    follower.close()
    assert b"".join(shown) == path.read_bytes()


def test_noise_is_dropped_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "log"
    follower, shown = _follow(path)
    noise = (
        b"[W1124 05:00:00 socket.cpp:767] [c10d] The hostname of the client socket cannot be "
        b"retrieved. err=-3\n"
        b"[Gloo] Rank 0 is connected to 1 peer ranks. Expected number of connected peer ranks"
        b" is : 1\n"
    )
    with path.open("ab", buffering=0) as file:
        file.write(b"first\n" + noise + b"last, [Gloo] Rank or not\n")
    follower.close()
    assert b"".join(shown) == b"first\nlast, [Gloo] Rank or not\n"


def test_the_source_line_below_a_librarys_warning_goes_with_it(tmp_path: Path) -> None:
    path = tmp_path / "log"
    follower, shown = _follow(path)
    warning = b"/env/lib/python3.11/site-packages/torch/x.py:12: FutureWarning: soon gone\n"
    with path.open("ab", buffering=0) as file:
        file.write(warning + b"  warnings.warn(text)\n  indented by the script\nlast\n")
        file.write(b"my/site/x.py:12: FutureWarning: mine\n  warnings.warn(mine)\n")
    follower.close()
    assert b"".join(shown) == (
        b"  indented by the script\nlast\n"
        b"my/site/x.py:12: FutureWarning: mine\n  warnings.warn(mine)\n"
    )


def test_after_a_failure_nothing_is_shown_from_a_traceback_on(tmp_path: Path) -> None:
    path = tmp_path / "log"
    follower, shown = _follow(path)
    with path.open("ab", buffering=0) as file:
        file.write(b"handled\nTraceback (most recent call last):\n  it goes on\n")
        follower.poll()
        follower.end_at_traceback()
        file.write(b"last words\n")
        follower.poll()
        file.write(b"[rank0]: Traceback (most recent call last):\n  File x\nRuntimeError: peer\n")
        follower.poll()
        file.write(b"unfinished")
    follower.close()
    assert b"".join(shown) == (
        b"handled\nTraceback (most recent call last):\n  it goes on\nlast words\n"
    )
