"""Where a node's logs of one attempt lie under the run's output directory."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class NodeLogs:
    """`<output_dir>/logs/attempt-NN/node-000-<host>/` and the files in it."""

    directory: Path

    @classmethod
    def of(cls, *, output_dir: str, attempt: int, node_rank: int, host: str) -> NodeLogs:
        """The place for one node's logs; nothing is made yet."""
        folder = f"node-{node_rank:03d}-{_safe(host)}"
        return cls(directory=Path(output_dir) / "logs" / f"attempt-{attempt:02d}" / folder)

    @property
    def agent(self) -> Path:
        return self.directory / "agent.log"

    @property
    def fork_server(self) -> Path:
        return self.directory / "fork-server.log"

    @property
    def store(self) -> Path:
        return self.directory / "store.log"

    def rank(self, rank: int) -> Path:
        return self.directory / f"rank-{rank:05d}.log"

    def error(self, rank: int) -> Path:
        """Where a rank leaves word of the exception that ended it."""
        return self.directory / f"rank-{rank:05d}.error.json"


def _safe(host: str) -> str:
    return "".join(c if c.isalnum() or c in "-_." else "_" for c in host) or "unknown"
