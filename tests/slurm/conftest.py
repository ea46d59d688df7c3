"""The testbed: one real Slurm cluster of four nodes for all tests of a session that need one."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

# Modules that several test files share lie beside them; no other folder's have these names.
sys.path.insert(0, str(Path(__file__).parent))

if TYPE_CHECKING:
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


def _cluster() -> Iterator[Testbed]:
    import slurm_testbed

    reason = slurm_testbed.missing()
    if reason is not None:
        pytest.skip(f"no Slurm testbed: {reason}")
    with slurm_testbed.testbed(NUM_NODES) as cluster:
        yield cluster
