"""Host memory into which the training state is copied, kept from one save to the next.

It is an anonymous file in memory, so that another process can be handed it without a copy, and so
that no mount such as a container's small /dev/shm limits it.
"""

from __future__ import annotations

import mmap
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from bigtrain.errors import CheckpointError

_ALIGNMENT = 64
_GROWTH = 64 << 20
"""The size is a multiple of this, so that a few more small tensors don't move everything."""


class Arena:
    """A growing buffer on `fd`. Not shared between threads."""

    def __init__(self) -> None:
        self.fd = os.memfd_create("bigtrain-checkpoint", os.MFD_CLOEXEC)
        self.size = 0
        self._bytes = torch.empty(0, dtype=torch.uint8)

    def reserve(self, nbytes: int) -> None:
        """Make room; CheckpointError where the machine hasn't that much memory."""
        if nbytes <= self.size:
            return
        size = -(-nbytes // _GROWTH) * _GROWTH
        if size - self.size > available_bytes():
            raise CheckpointError(
                f"no memory to copy the training state to: it takes {size >> 20} MiB, "
                f"{available_bytes() >> 20} MiB are free"
            )
        # It may be longer already, where it was made ready ahead.
        if os.fstat(self.fd).st_size < size:
            os.ftruncate(self.fd, size)
        # The old mapping goes once no tensor uses it any more.
        self._bytes = torch.frombuffer(mmap.mmap(self.fd, size), dtype=torch.uint8)
        self._pin()
        self.size = size

    def copy(self, tensors: Sequence[Tensor]) -> list[memoryview]:
        """The bytes of these 1-D tensors, in the arena; what was there before is overwritten."""
        places, needed = layout([tensor.nbytes for tensor in tensors])
        self.reserve(needed)
        for tensor, place in zip(tensors, places, strict=True):
            if tensor.numel():
                target = self._bytes[place : place + tensor.nbytes].view(tensor.dtype)
                target.copy_(tensor.detach(), non_blocking=True)
        if any(tensor.is_cuda for tensor in tensors):
            torch.cuda.synchronize()
        whole = self._bytes.numpy().data if self.size else memoryview(b"")
        return [
            whole[place : place + tensor.nbytes]
            for tensor, place in zip(tensors, places, strict=True)
        ]

    def close(self) -> None:
        """Safe to call twice."""
        if self.fd >= 0:
            os.close(self.fd)
        self.fd = -1
        self._bytes = torch.empty(0, dtype=torch.uint8)

    def _pin(self) -> None:
        """Let a GPU copy straight into it, where there is one."""
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            # Only slower where it fails.
            torch.cuda.cudart().cudaHostRegister(self._bytes.data_ptr(), self._bytes.numel(), 0)


def layout(sizes: Sequence[int]) -> tuple[list[int], int]:
    """Where buffers of these sizes begin, one after another, and where the last one ends."""
    places: list[int] = []
    end = 0
    for size in sizes:
        places.append(end)
        end += -(-size // _ALIGNMENT) * _ALIGNMENT
    return places, end


def is_supported() -> bool:
    """Whether this system has anonymous files."""
    return sys.platform == "linux" and hasattr(os, "memfd_create")


def available_bytes() -> int:
    """Memory that can be taken without swapping: the machine's, or this control group's."""
    free = _machine_available()
    limit, used = _number("/sys/fs/cgroup/memory.max"), _number("/sys/fs/cgroup/memory.current")
    return free if limit is None or used is None else min(free, max(0, limit - used))


def _machine_available() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return sys.maxsize


def _number(path: str) -> int | None:
    try:
        text = Path(path).read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None
