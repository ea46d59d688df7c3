"""What tells a process from every other one: ids are used again, and each machine has its own."""

from __future__ import annotations

import os
import socket
from pathlib import Path


def machine() -> str:
    """What tells apart machines, their boots, and containers in which process ids count anew."""
    parts = []
    for read in (
        lambda: Path("/proc/sys/kernel/random/boot_id").read_text().strip(),
        lambda: os.readlink("/proc/self/ns/pid"),  # noqa: PTH115 (a name, not a path)
    ):
        try:
            parts.append(read())
        except OSError:
            parts.append("")
    return " ".join([socket.gethostname(), *parts])


def started(pid: int) -> str:
    """When the process did, in the kernel's ticks; empty where there is none, or one that has
    ended and was not waited for."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]
