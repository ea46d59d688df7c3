"""Which modules the fork server imports once, so that no rank has to."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bigtrain.translate.config import EngineName

_ENGINE_MODULES: Mapping[EngineName, tuple[str, ...]] = {
    "single": ("bigtrain.engine.single",),
    "ddp": ("bigtrain.engine.ddp",),
    "fsdp": ("torch.distributed.fsdp", "bigtrain.engine.fsdp"),
    "zero1": ("deepspeed", "bigtrain.engine.deepspeed"),
    "zero2": ("deepspeed", "bigtrain.engine.deepspeed"),
    "zero3": ("deepspeed", "bigtrain.engine.deepspeed"),
}


def for_run_file(
    engine: EngineName, model_type: str | None, training: Mapping[str, Any]
) -> tuple[str, ...]:
    """What the worker imports on its way to the first step."""
    modules = ["torch", "bigtrain.worker", "bigtrain.trainer", "bigtrain.checkpoint.save"]
    modules += _ENGINE_MODULES[engine]
    modules += _model_modules(model_type)
    if "tensorboard" in str(training.get("report_to", "")):
        modules.append("torch.utils.tensorboard")
    return tuple(modules)


def for_script(engine: EngineName, imported: tuple[str, ...]) -> tuple[str, ...]:
    """The script's own libraries; with bigtrain's Trainer among them, its engine's too."""
    uses_trainer = any(name.partition(".")[0] == "bigtrain" for name in imported)
    engine_modules = _ENGINE_MODULES[engine] if uses_trainer else ()
    return tuple(dict.fromkeys((*imported, *engine_modules)))


def _model_modules(model_type: str | None) -> list[str]:
    """The module that defines the model's classes, where this transformers has one."""
    generic = "transformers.models.auto.modeling_auto"
    spec = importlib.util.find_spec("transformers")
    if model_type is None or spec is None or spec.origin is None:
        return [generic]
    name = model_type.replace("-", "_")
    if not re.fullmatch(r"\w{1,100}", name):
        return [generic]
    file = Path(spec.origin).parent / "models" / name / f"modeling_{name}.py"
    return [generic, f"transformers.models.{name}.modeling_{name}"] if file.is_file() else [generic]
