"""Reads the structure of a pickle without running it.

Whatever class or function a pickle names, nothing is imported and nothing of it is called: a few
names get a harmless meaning (dict, tuple, tensors as references), all others become stubs that
keep what they were given. All that a pickle can touch is made afresh for each one, so that a
hostile file can't even change the meaning of the next.
"""

from __future__ import annotations

import gc
import io
import pickle
import reprlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bigtrain.checkpoint.opcodes import fault_of
from bigtrain.errors import CheckpointError

_SAFE: Mapping[tuple[str, str], Any] = {
    ("torch", "Size"): tuple,
    ("builtins", "dict"): dict,
    ("builtins", "list"): list,
    ("builtins", "tuple"): tuple,
    ("builtins", "set"): set,
    ("builtins", "frozenset"): frozenset,
    ("builtins", "complex"): complex,
    ("__builtin__", "set"): set,
    ("__builtin__", "frozenset"): frozenset,
    ("__builtin__", "complex"): complex,
}
"""Immutable built-in types; the names of Python 2 are those that pickle protocol 2 uses."""

_SHOWN = 300
"""Letters of a fault that are shown."""


class Inert:
    """Stands for an object of a class that was not imported."""

    qualified = ""
    """The name that the pickle gave, such as `torch.distributed.checkpoint.metadata.Metadata`."""

    def __init__(self, *args: Any, **fields: Any) -> None:
        self.args = args
        self.fields = dict(fields)
        self.state: Any = None
        self.items: list[Any] = []

    def __new__(cls, *args: Any, **fields: Any) -> Inert:
        made = super().__new__(cls)
        Inert.__init__(made, *args, **fields)
        return made

    def __setstate__(self, state: Any) -> None:
        self.state = state
        if isinstance(state, dict):
            self.fields = {**self.fields, **state} if self.fields else state

    def __call__(self, *args: Any) -> Inert:
        """What `getattr(module, name)(…)` would have made, were there anything behind it."""
        return Inert(self, *args)

    def __setitem__(self, key: Any, value: Any) -> None:
        self.items.append((key, value))

    def append(self, value: Any) -> None:
        self.items.append(value)

    def extend(self, values: Any) -> None:
        self.items.extend(values)

    def __repr__(self) -> str:
        return f"<{self.qualified}, not loaded>"


class InertUnpickler(pickle.Unpickler):
    """`names` adds meanings to the safe ones; its values must not be shared between pickles.

    Raises UnpicklingError where the pickle would take far more memory than its own size.
    """

    def __init__(
        self,
        content: bytes,
        *,
        names: Mapping[tuple[str, str], Any] | None = None,
        persistent: Callable[[Any], Any] | None = None,
    ) -> None:
        if fault := fault_of(content):
            raise pickle.UnpicklingError(fault)
        super().__init__(io.BytesIO(content))
        self._names = {
            **_SAFE,
            ("collections", "OrderedDict"): _plain_dict(),
            **(names or {}),
        }
        self._persistent = persistent

    def find_class(self, module: str, name: str, /) -> Any:
        try:
            return self._names[module, name]
        except KeyError:
            # Also of values such as torch.float32, which `read_name` then tells by that name.
            stub = type("Stub", (Inert,), {"qualified": f"{module}.{name}"})
            self._names[module, name] = stub
            return stub

    def persistent_load(self, pid: Any, /) -> Any:
        if self._persistent is None:
            raise pickle.UnpicklingError("a reference to data outside of the pickle")
        return self._persistent(pid)


def plain_record() -> type[Any]:
    """A class whose objects are only the attributes that a pickle gives them: for what it has
    hundreds of thousands of. Made afresh, as a pickle can set attributes of the class, too."""
    return type("Record", (), {})


def _plain_dict() -> type[dict[Any, Any]]:
    """A dict that drops the attributes a pickle gives it: a module's state dict has some."""
    return type("OrderedDict", (dict,), {"__setstate__": lambda self, state: None})


def read_pickle(
    content: bytes,
    *,
    path: Path,
    names: Mapping[tuple[str, str], Any] | None = None,
    persistent: Callable[[Any], Any] | None = None,
) -> Any:
    """The structure of the pickle; any fault of it as a CheckpointError that names `path`."""
    try:
        with without_collecting():
            return InertUnpickler(content, names=names, persistent=persistent).load()
    except CheckpointError:
        raise
    except Exception as fault:  # a damaged pickle can raise anything at all
        raise CheckpointError(
            f"{path}: its structure can't be read ({brief(fault)}); "
            "the file is damaged or not what it seems"
        ) from fault


@contextmanager
def without_collecting() -> Iterator[None]:
    """Looks for no garbage: among millions of new objects that are all kept, it only takes time."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            if not gc.get_freeze_count():
                # They count as old from now on: else the next object made would have all of them
                # looked through.
                gc.freeze()
                gc.unfreeze()
            gc.enable()


def brief(value: Any) -> str:
    """How a message shows a file's value, or the fault that came of it. Lists that hold each other
    take few bytes in a pickle and more than there are when they are written out."""
    if isinstance(value, BaseException):
        shown = (arg[:_SHOWN] if isinstance(arg, str) else brief(arg) for arg in value.args)
        return f"{type(value).__name__}: {', '.join(shown)}"
    return reprlib.repr(value)


def unfolds(value: Any, *, limit: int = 100_000) -> bool:
    """Whether a value takes more than `limit` words to write out."""
    pending, count = [value], 0
    while pending and count <= limit:
        each = pending.pop()
        count += 1
        if isinstance(each, Mapping):
            pending += [*each.keys(), *each.values()]
        elif isinstance(each, (list, tuple, set, frozenset)):
            pending += each
    return count > limit


def read_name(value: Any) -> str | None:
    """The full name where a pickle holds a bare name (a class or a `torch.dtype`), else None."""
    if isinstance(value, type) and issubclass(value, Inert):
        return value.qualified
    return None


def class_name(value: Any) -> str:
    """The last part of the name of a stub's class; of anything else, its type's name."""
    qualified = value.qualified if isinstance(value, Inert) else type(value).__name__
    return qualified.rpartition(".")[2]
