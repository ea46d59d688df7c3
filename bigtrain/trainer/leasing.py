"""A training holds its output directory for as long as it may write checkpoints there."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bigtrain.checkpoint import lease
from bigtrain.checkpoint.agreement import on_main
from bigtrain.plan import RunPlan
from bigtrain.topology import RankInfo
from bigtrain.trainer import environment

logger = logging.getLogger(__name__)


class Leasing:
    """Whose the output directory is."""

    _lease: lease.Lease | None = None
    """Rank 0's, while it trains."""

    @contextmanager
    def _holding(self, output_dir: Path, plan: RunPlan | None, world: RankInfo) -> Iterator[None]:
        """Inside, nobody else trains into it. CheckpointError on all ranks where somebody does."""
        on_main(world, lambda: self._take(output_dir, plan))
        try:
            yield
        finally:
            if self._lease is not None:
                self._lease.release()
                self._lease = None

    def _take(self, output_dir: Path, plan: RunPlan | None) -> None:
        launch = f"{plan.run_id} {plan.attempt}" if plan is not None else ""
        try:
            self._lease = lease.take(
                output_dir, launch=launch, is_restarted=environment.is_restarted()
            )
        except OSError as fault:
            # The save itself will say what is wrong, and what follows from it.
            logger.warning("%s can't be held against other runs: %s", output_dir, fault)

    def _may_write(self) -> None:
        """Raises CheckpointError where another run has taken the directory over."""
        if self._lease is not None:
            self._lease.check()
