"""LoRA: the model's own parameters frozen, and two narrow matrices beside each adapted one.

Names and shapes are peft's (`peft/tuners/lora/layer.py`); its adapters are in fp32.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from bigtrain.errors import ConfigError
from bigtrain.memory.shapes import ModelShapes, Parameter

PREFIX = "base_model.model."


def with_adapters(shapes: ModelShapes, lora: Mapping[str, Any] | None) -> ModelShapes:
    """The shapes of the adapted model; `shapes` itself without LoRA."""
    if not lora:
        return shapes
    targets = tuple(lora["target_modules"])
    parameters = tuple(
        adapted
        for parameter in shapes.parameters
        for adapted in _adapted(parameter, rank=int(lora["rank"]), targets=targets)
    )
    if not any(parameter.trained for parameter in parameters):
        raise ConfigError(
            f"model.lora.target_modules: the model has no module named {', '.join(targets)}"
        )
    return replace(shapes, parameters=parameters, source=f"{shapes.source}, with LoRA")


def _adapted(parameter: Parameter, *, rank: int, targets: tuple[str, ...]) -> Iterator[Parameter]:
    module, _, kind = parameter.name.rpartition(".")
    # peft's rule for a list (`tuners_utils.check_target_module_exists`).
    is_target = module in targets or module.endswith(tuple(f".{name}" for name in targets))
    owner = f"{PREFIX}{module}"
    base = f"{owner}.base_layer.{kind}" if is_target else f"{PREFIX}{parameter.name}"
    yield replace(parameter, name=base, trained=False)
    if is_target and kind == "weight" and len(parameter.shape) == 2:
        rows, columns = parameter.shape[::-1] if parameter.is_transposed else parameter.shape
        for name, shape in (("lora_A", (rank, columns)), ("lora_B", (rows, rank))):
            yield Parameter(name=f"{owner}.{name}.default.weight", shape=shape, dtype="fp32")
