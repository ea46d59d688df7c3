"""The testbed: one real Slurm cluster of four nodes for all tests of a session that need one."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

# Modules that several test files share lie beside them; no other folder's have these names.
sys.path.insert(0, str(Path(__file__).parent))

if TYPE_CHECKING:
    from scripts_on_testbed import Run
    from slurm_testbed import Testbed

NUM_NODES = 4


@pytest.fixture(scope="session")
def bed() -> Iterator[Testbed]:
    """A cluster that is up; skipped, with the reason, where the machine can't carry one."""
    yield from _cluster()


@pytest.fixture
def own_bed() -> Iterator[Testbed]:
    """A cluster of one test's own: for those that lose nodes."""
    yield from _cluster()


@pytest.fixture
def start(bed: Testbed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Run]:
    """Submits a script: `start(text, *args, nodes=, section=, wrapper=, **plan fields)`."""
    from scripts_on_testbed import starter

    return starter(bed, tmp_path, monkeypatch)


@pytest.fixture
def start_to_lose(
    own_bed: Testbed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Run]:
    """The same on a cluster of the test's own, which it may break."""
    from scripts_on_testbed import starter

    return starter(own_bed, tmp_path, monkeypatch)


def _cluster() -> Iterator[Testbed]:
    import slurm_testbed

    reason = slurm_testbed.missing()
    if reason is not None:
        pytest.skip(f"no Slurm testbed: {reason}")
    with slurm_testbed.testbed(NUM_NODES) as cluster:
        yield cluster
