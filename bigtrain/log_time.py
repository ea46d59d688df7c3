"""The time at the head of a log's line: the node's own, with its distance from UTC.

Nodes may be in several zones, and whoever reads the logs in another.
"""

from __future__ import annotations

import calendar
import re
import time

_HEAD = re.compile(rb"(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d)[,.](\d{3})(?:([+-])(\d\d)(\d\d))? ")


def stamp(seconds: float) -> str:
    """`2026-01-31 12:00:00,000+0100` for a time in seconds since the epoch."""
    local = time.localtime(seconds)
    whole, zone = time.strftime("%Y-%m-%d %H:%M:%S", local), time.strftime("%z", local)
    return f"{whole},{int(seconds % 1 * 1000):03d}{zone}"


def read_stamp(line: bytes) -> float | None:
    """The time that a line begins with; None where there is none.

    One without a zone is taken as this machine's.
    """
    head = _HEAD.match(line)
    if head is None:
        return None
    try:
        whole = time.strptime(head[1].decode(), "%Y-%m-%d %H:%M:%S")
        seconds = calendar.timegm(whole) if head[3] else time.mktime(whole)
    except (ValueError, OverflowError):
        return None
    distance = 3600 * int(head[4]) + 60 * int(head[5]) if head[3] else 0
    return seconds + int(head[2]) / 1000 - (distance if head[3] == b"+" else -distance)
