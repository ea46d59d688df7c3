"""Live bytes of tensors, counted as they come and go, on real and on fake ones.

As torch.distributed._tools.mem_tracker does it: every operation's results are seen by a dispatch
mode, a storage's end by a weak reference, and FSDP's resizing of storages by a patch of `resize_`.
Unlike the profiler's events, this misses no release on another thread.
"""

from __future__ import annotations

import weakref
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts while it is entered. `live` is the running sum, `peak` its largest value."""

    def __init__(self) -> None:
        super().__init__()
        self.live = 0
        self.peak = 0
        self._sizes: dict[int, int] = {}
        self._resize = torch.UntypedStorage.resize_

    def __enter__(self) -> LiveBytes:
        meter = self

        def resize(storage: torch.UntypedStorage, size: int) -> Any:
            result = meter._resize(storage, size)
            meter._resized(storage)
            return result

        torch.UntypedStorage.resize_ = resize  # type: ignore[method-assign,assignment]
        super().__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        torch.UntypedStorage.resize_ = self._resize  # type: ignore[method-assign]
        super().__exit__(kind, error, trace)

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.add(leaf)
        return result

    def add(self, tensor: Tensor) -> None:
        """Count a tensor's storage, if it is new."""
        local = tensor._local_tensor if isinstance(tensor, DTensor) else tensor
        if local.is_meta:
            return
        storage = local.untyped_storage()
        if identity(local) in self._sizes:
            return
        self._sizes[identity(local)] = 0
        weakref.finalize(storage, self._remove, identity(local))
        self._grow(identity(local), storage.nbytes())

    def forget(self, tensor: Tensor) -> None:
        """Count a tensor's storage as nothing from now on."""
        key = identity(tensor)
        self.live -= self._sizes.get(key, 0)
        self._sizes[key] = 0

    def changed(self) -> None:
        """Called when `live` has grown."""
        self.peak = max(self.peak, self.live)

    def _grow(self, key: int, size: int) -> None:
        self.live += size - self._sizes[key]
        self._sizes[key] = size
        self.changed()

    def _resized(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata in self._sizes:
            self._grow(storage._cdata, storage.nbytes())

    def _remove(self, key: int) -> None:
        self.live -= self._sizes.pop(key, 0)


def identity(tensor: Tensor) -> int:
    """What tells one storage from all others that live."""
    return int(tensor.untyped_storage()._cdata)
