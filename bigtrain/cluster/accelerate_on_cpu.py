"""Lets accelerate run ZeRO and FSDP2 without a GPU, in scripts that choose them by environment.

Its `PartialState` takes those engines only where it has found a GPU; on a CPU it silently trains
without them (accelerate/state.py, `_prepare_backend`), and so it does wherever a script asks for
the CPU (`--use_cpu`, `Accelerator(cpu=True)`). Everything after that choice works over gloo. The
patch is made when a script imports the module, so that the script's imports stay its own.
"""

from __future__ import annotations

import functools
import importlib.abc
import importlib.util
import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_ENGINES = ("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP")


def install(environment: Mapping[str, str]) -> None:
    """Arrange the patches, where `environment` asks for such an engine on a CPU."""
    on_cpu = environment.get("ACCELERATE_TORCH_DEVICE") == "cpu"
    if not on_cpu or not any(environment.get(name) == "true" for name in _ENGINES):
        return
    uses_fsdp = environment.get("ACCELERATE_USE_FSDP") == "true"
    patches: dict[str, Callable[[Any], None]] = {
        "accelerate.state": lambda module: _patch_state(module, uses_fsdp=uses_fsdp),
        "transformers.training_args": _patch_arguments,
        "deepspeed.ops": _patch_operators,
    }
    for name, patch in patches.items():
        if name in sys.modules:
            patch(sys.modules[name])
    sys.meta_path.insert(0, _PatchingFinder(patches))


def _patch_state(module: Any, *, uses_fsdp: bool) -> None:
    kinds = module.DistributedType
    # Only with this kind does accelerate look at FSDP's variables; DeepSpeed's override any.
    kind = kinds.MULTI_GPU if uses_fsdp else kinds.NO

    def prepare(*_: Any, **__: Any) -> tuple[str, Any]:
        return "gloo", kind

    module.PartialState._prepare_backend = prepare
    for state in (module.PartialState, module.AcceleratorState):
        state.__init__ = _deaf_to_cpu(state.__init__)


def _deaf_to_cpu(init: Callable[..., None]) -> Callable[..., None]:
    """`init` as though nobody had asked for the CPU: the environment has chosen it already, and a
    state that is told so starts no process group and forgets the engine."""
    signature = inspect.signature(init)

    @functools.wraps(init)
    def initialize(*args: Any, **kwargs: Any) -> None:
        said = signature.bind(*args, **kwargs)
        said.arguments["cpu"] = False
        init(*said.args, **said.kwargs)

    return initialize


def _patch_arguments(module: Any) -> None:
    # Asked whether bf16 works on the GPU, before a plugin has said that there is none.
    module.is_torch_bf16_gpu_available = lambda: True


def _patch_operators(module: Any) -> None:
    # A reduction for inference, which DeepSpeed would compile at its first start; the lock of a
    # compilation that was killed makes every later start wait for ever.
    module.__compatible_ops__["deepspeed_shm_comm"] = False


class _PatchingFinder(importlib.abc.MetaPathFinder):
    """Finds the modules to patch as they would be found, and patches them once they are run."""

    def __init__(self, patches: Mapping[str, Callable[[Any], None]]) -> None:
        self._patches = dict(patches)

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        patch = self._patches.pop(name, None)
        if patch is None:
            return None
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return spec
        run = spec.loader.exec_module

        def run_and_patch(module: ModuleType) -> None:
            run(module)
            patch(module)

        spec.loader.exec_module = run_and_patch  # type: ignore[method-assign]
        return spec
