"""How long before its time limit a run is told to save, and a watch that tells it.

The scheduler's own notice has a lead that was fixed when the job was submitted, when nobody knew
how long its saves would take. The first node looks at the last save and at the limit as they are.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

_SHORTEST_LEAD_S = 120.0
_SAVES_AHEAD = 2
_LARGEST_SHARE = 0.5
"""Of the whole time limit: a lead as long as the limit would end every start as it begins."""
_LOOK_EVERY_S = 5.0
"""At most; far from the limit less often, since a look asks for all files of a checkpoint."""


@dataclass(frozen=True, kw_only=True)
class TimeLimit:
    """When a run has to be gone, in seconds since the epoch."""

    starts: float
    ends: float


def lead_s(last_save_s: float | None, *, limit_s: float | None = None) -> int:
    """Seconds between the notice and the end: two saves as long as the last one, at least 120, and
    never more than half of a limit that is known."""
    lead = max(_SHORTEST_LEAD_S, _SAVES_AHEAD * (last_save_s or 0.0))
    return round(lead if limit_s is None else min(lead, _LARGEST_SHARE * limit_s))


def last_save_s(output_dir: Path) -> float | None:
    """How long the newest checkpoint took to write: from its first whole file to its manifest.

    None where there is none, or none that can still be looked at.
    """
    try:
        manifests = [(p.stat().st_mtime, p) for p in output_dir.glob("checkpoint-*/manifest.json")]
        committed, manifest = max(manifests)
        files = [path.stat().st_mtime for path in manifest.parent.rglob("*") if path.is_file()]
        return max(0.0, committed - min(files))
    except (OSError, ValueError):  # rotated away meanwhile; no manifest
        return None


@contextlib.contextmanager
def watched(
    read: Callable[[], TimeLimit | None], output_dir: Path, *, notify: Callable[[str], None]
) -> Iterator[None]:
    """Inside, `notify` is called once, in a thread, when the limit is near; with why.

    `read` tells the limit, or None where there is none; it is asked again before the notice, since
    a limit can be extended.
    """
    is_over, at_notice = threading.Event(), threading.Lock()

    def watch() -> None:
        limit = read()
        while limit is not None:
            ahead = lead_s(last_save_s(output_dir), limit_s=limit.ends - limit.starts)
            left = limit.ends - time.time()
            if left <= ahead:
                later = read()
                if later is None or later.ends <= limit.ends:
                    with at_notice:
                        if not is_over.is_set():
                            notify(f"the time limit is {max(0.0, left):.0f} s away: saving")
                    return
                limit = later
            elif is_over.wait(min(left - ahead, max(_LOOK_EVERY_S, (left - ahead) / 4))):
                return

    thread = threading.Thread(target=watch, name="time-limit", daemon=True)
    thread.start()
    try:
        yield
    finally:
        with at_notice:  # a signal that came now would meet nobody who hears it
            is_over.set()
