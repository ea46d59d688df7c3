"""How much memory one rank has, and from where that is known. No torch, and CUDA is not started."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

_MEMINFO = Path("/proc/meminfo")
_CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")
_LIBRARIES_ON_GPU = 3 << 29
"""The CUDA context, cuBLAS' workspaces and NCCL's channels: 1 to 1.5 GiB on current GPUs."""
_LIBRARIES_ON_CPU = 3 << 28
"""An interpreter with torch and transformers, of which forked ranks share a part."""
_FRAGMENTATION = 0.05


@dataclass(frozen=True, kw_only=True)
class DeviceMemory:
    """Bytes that one rank can have. None: not known."""

    total: int | None = None
    origin: str = ""
    device: Literal["cpu", "cuda"] = "cpu"
    host: int | None = None
    """A GPU's rank's share of the host's memory, to offload to."""

    @property
    def reserve(self) -> int:
        """What is kept free for libraries, and for what the allocator can't use."""
        libraries = _LIBRARIES_ON_GPU if self.device == "cuda" else _LIBRARIES_ON_CPU
        return libraries + int(_FRAGMENTATION * (self.total or 0))

    @property
    def usable(self) -> int | None:
        return None if self.total is None else max(0, self.total - self.reserve)

    def holds_offloaded(self, number: int) -> bool:
        """Whether the host can take so many bytes of each rank, as far as that is known."""
        return self.host is None or number <= self.host


def rank_memory(
    device: Literal["cpu", "cuda"],
    *,
    procs_per_node: int,
    said: int | None,
    environment: Mapping[str, str],
) -> DeviceMemory:
    """What was said, else what this machine has: its GPUs' memory, or its share of RAM."""
    if said is not None:
        return DeviceMemory(total=said, origin="flag --device-memory", device=device)
    host = _host_bytes()
    if device == "cuda":
        total = _smallest_gpu()
        origin = "this machine's GPUs" if total else ""
        share = None if host is None else host // procs_per_node
        return DeviceMemory(total=total, origin=origin, device=device, host=share)
    if host is None:
        return DeviceMemory(device=device)
    origin = f"this machine's memory ÷ {procs_per_node} processes"
    return DeviceMemory(total=host // procs_per_node, origin=origin, device=device)


@lru_cache(maxsize=1)
def _smallest_gpu() -> int | None:
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
        handles = (
            pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())
        )
        return min((int(pynvml.nvmlDeviceGetMemoryInfo(h).total) for h in handles), default=None)
    except pynvml.NVMLError:
        return None


def _host_bytes() -> int | None:
    try:
        found = re.search(r"^MemTotal:\s+(\d+) kB", _MEMINFO.read_text(), re.MULTILINE)
    except OSError:
        return None
    total = int(found[1]) * 1024 if found else None
    try:
        limit = _CGROUP_LIMIT.read_text().strip()
    except OSError:
        limit = "max"
    if not limit.isdigit():
        return total
    return min(int(limit), total) if total else int(limit)
