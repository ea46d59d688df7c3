"""The few kernel calls that Python does not offer."""

from __future__ import annotations

import ctypes
import os
import signal
from pathlib import Path

# From linux/prctl.h.
_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36


def adopt_orphans() -> None:
    """From now on, descendants whose parent dies become this process's own children."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def die_with_parent() -> None:
    """The kernel sends SIGKILL to this process when its parent dies; kept across exec."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def outlive_parent() -> None:
    """Undo `die_with_parent`."""
    _prctl(_PR_SET_PDEATHSIG, 0)


def kill_group(group: int, number: int = signal.SIGKILL) -> None:
    """Send a signal to every process of a group; one that is gone already is no error."""
    try:
        os.killpg(group, number)
    except ProcessLookupError:
        pass
    except PermissionError:
        # The kernel says so when a group holds nothing but processes of other users, such as a
        # set-uid program that a rank started. None of them is ours to end.
        pass


def num_threads() -> int:
    """Threads of this process as the kernel counts them, those of C libraries too."""
    return sum(1 for _ in Path("/proc/self/task").iterdir())


def cuda_is_initialized() -> bool:
    """Whether CUDA's driver was initialised in this process, by whatever library.

    Asked of the driver itself: `torch.cuda.is_initialized()` knows only of torch's own start, but
    a mere query of the device count calls `cuInit` too, and after that no fork can use a GPU.
    """
    library = _loaded_library("libcuda.so")
    if library is None:
        return False
    context = ctypes.c_void_p()
    not_initialized = 3  # CUDA_ERROR_NOT_INITIALIZED
    return int(ctypes.CDLL(library).cuCtxGetCurrent(ctypes.byref(context))) != not_initialized


def _loaded_library(name: str) -> str | None:
    for line in Path("/proc/self/maps").read_text().splitlines():
        path = line.rpartition(" ")[2]
        if Path(path).name.startswith(name):
            return path
    return None


def _prctl(option: int, value: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    arguments = [ctypes.c_ulong(n) for n in (value, 0, 0, 0)]
    if libc.prctl(ctypes.c_int(option), *arguments) != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"prctl({option}): {os.strerror(code)}")
