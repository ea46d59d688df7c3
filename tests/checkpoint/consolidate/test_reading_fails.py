"""A system that can't read: the file is named, and what was copied stays."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from bigtrain.checkpoint.consolidate import consolidate
from bigtrain.errors import CheckpointError
from tests.checkpoint.consolidate.test_consolidate import plain

NOBODY = 65534
AS_NOBODY = """
import os, sys
from pathlib import Path
from bigtrain.checkpoint.source import open_source
from bigtrain.errors import CheckpointError
if os.geteuid() == 0:
    os.setgroups([])
    os.setgid(int(sys.argv[2]))
    os.setuid(int(sys.argv[2]))
print(open_source(Path(sys.argv[1])).path.name)
"""


def test_a_file_of_the_source_that_goes_stale_is_named_and_the_rest_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = plain(tmp_path / "in", {f"t{i}": torch.full((1000,), float(i)) for i in range(30)})
    preadv, file = os.preadv, source / "model.safetensors"

    def stale(fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        if Path(f"/proc/self/fd/{fd}").resolve() == file and offset > 50_000:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return preadv(fd, buffers, offset)

    with monkeypatch.context() as patch:
        patch.setattr(os, "preadv", stale)
        with pytest.raises(CheckpointError, match=f"{file}: Stale file handle"):
            consolidate(source, tmp_path / "out", max_shard_size="8KB", jobs=1)
    assert list((tmp_path / "out.partial").glob("*.safetensors"))
    consolidate(source, tmp_path / "out", max_shard_size="8KB", resume=True)


def test_a_directory_of_the_runs_that_can_not_be_looked_into_is_no_hindrance() -> None:
    import tempfile

    with tempfile.TemporaryDirectory(dir="/tmp") as folder:  # pytest's own is closed to others
        run = Path(folder)
        plain(run / "checkpoint-5", {"w": torch.ones(2)})
        (run / "lost+found").mkdir(mode=0o700)
        run.chmod(0o755)
        (run / "checkpoint-5" / "model.safetensors").chmod(0o644)
        if os.geteuid() == 0:
            done = subprocess.run(
                [sys.executable, "-c", AS_NOBODY, folder, str(NOBODY)],
                capture_output=True,
                text=True,
            )
        else:
            (run / "lost+found").chmod(0)
            done = subprocess.run(
                [sys.executable, "-c", AS_NOBODY, folder, "0"], capture_output=True, text=True
            )
    assert (done.returncode, done.stdout) == (0, "checkpoint-5\n"), done.stderr


def test_a_journal_of_the_users_is_left_alone(tmp_path: Path) -> None:
    mine = tmp_path / "out.partial" / "journal.jsonl"
    mine.parent.mkdir()
    mine.write_text("my diary\n")
    with pytest.raises(CheckpointError, match="holds files that no consolidation wrote"):
        consolidate(plain(tmp_path / "in", {"w": torch.ones(2)}), tmp_path / "out")
    assert mine.read_text() == "my diary\n"
