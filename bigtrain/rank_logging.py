"""Where a rank's log records and library noise go.

Under bigtrain's launcher a rank's output is its log file, and what a person should see goes to the
agent as events. Without the launcher the output is the terminal, so it gets rank 0's records and
everyone's warnings, and nothing that no user can act on.
"""

from __future__ import annotations

import logging
import sys
import warnings
from pathlib import Path

import transformers

from bigtrain.cluster.events import EventHandler
from bigtrain.log_time import stamp
from bigtrain.topology import RankInfo

# Loggers whose INFO and below tells a user nothing to act on.
_QUIET = ("DeepSpeed", "deepspeed", "torch.distributed", "httpx", "fsspec", "filelock")
_DATED = "%(asctime)s %(levelname)s %(name)s: %(message)s"


class _Dated(logging.Formatter):
    """Its times say their zone."""

    def formatTime(  # noqa: N802 (logging's own name)
        self, record: logging.LogRecord, datefmt: str | None = None
    ) -> str:
        return stamp(record.created)


class _Spoken(logging.Formatter):
    """As the console says it."""

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        return f"{record.levelname.lower()}: {text}" if record.levelno >= logging.WARNING else text


def set_up(world: RankInfo, *, has_agent: bool) -> None:
    """Lay the way of bigtrain's records, once per process; other handlers stay as they are."""
    logger = logging.getLogger("bigtrain")
    if any(getattr(handler, "is_bigtrain", False) for handler in logger.handlers):
        return
    # Of loading and of writing shards; training has its own.
    transformers.logging.disable_progress_bar()
    logger.setLevel(logging.INFO)
    logger.propagate = False
    shown = logging.INFO if has_agent or world.is_main else logging.WARNING
    _add(logger, _stream_handler(world, level=shown, has_agent=has_agent))
    _ignore_deprecations()
    if has_agent:
        _add(logger, EventHandler(is_main=world.is_main))
    else:
        for name in _QUIET:
            logging.getLogger(name).setLevel(logging.WARNING)


def set_up_for_script(world: RankInfo) -> None:
    """The same under an agent for a script's `Trainer`: bigtrain's records reach the rank's log and
    the agent. What the script itself has said of logging counts, and nothing else is touched."""
    logger = logging.getLogger("bigtrain")
    if any(getattr(handler, "is_bigtrain", False) for handler in logger.handlers):
        return
    if logger.level == logging.NOTSET:
        logger.setLevel(logging.INFO)
    if not logger.hasHandlers():
        handler = _stream_handler(world, level=logging.INFO, has_agent=True)
        if world.is_main:  # whose log is what a script's user sees
            handler.setFormatter(_Spoken())
        _add(logger, handler)
    if not world.is_main:
        _add(logger, EventHandler(is_main=False))


def keep(path: Path) -> None:
    """Write bigtrain's records to a file as well, as an agent would have done."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(_Dated(_DATED))
    _add(logging.getLogger("bigtrain"), handler)


def _add(logger: logging.Logger, handler: logging.Handler) -> None:
    handler.is_bigtrain = True  # type: ignore[attr-defined]
    logger.addHandler(handler)


def _stream_handler(world: RankInfo, *, level: int, has_agent: bool) -> logging.Handler:
    handler = logging.StreamHandler(sys.stderr)
    handler.setLevel(level)
    where = "" if has_agent or world.is_main else f"[{world.node_rank}:{world.rank}] "
    form = _DATED if has_agent else "%(message)s"
    handler.setFormatter(_Dated(where + form))
    return handler


def _ignore_deprecations() -> None:
    """Those that these libraries raise about each other's calls."""
    for module in ("torch", "transformers", "deepspeed", "accelerate"):
        warnings.filterwarnings("ignore", category=FutureWarning, module=module)
        warnings.filterwarnings("ignore", category=DeprecationWarning, module=module)
