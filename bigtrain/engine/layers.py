"""Which modules of a model are sharded one by one: its transformer layers, found from the model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator

from torch import nn

from bigtrain.errors import ConfigError


def find_layers(model: nn.Module, wrap_classes: Collection[str] = ()) -> list[nn.Module]:
    """The outermost modules of the given classes, or of those that the model says not to split.

    Without either: the members of the largest list of equal modules. A module that shares a
    parameter with the rest of the model (tied embeddings) is left out: a parameter can be gathered
    with one group only, and those that are shared go with the model's root.
    """
    if wrap_classes:
        found = list(_outermost(model, set(wrap_classes)))
        if missing := set(wrap_classes) - {type(module).__name__ for module in model.modules()}:
            raise ConfigError(
                f"engine.wrap_classes: the model has no {', '.join(sorted(missing))}"
                f"; its repeated classes are {', '.join(_repeated_classes(model)) or '(none)'}"
            )
    else:
        found = list(_outermost(model, _unsplit_classes(model))) or _largest_list(model)
    return [layer for layer in found if not _shares_parameters(layer, model)]


def _unsplit_classes(model: nn.Module) -> set[str]:
    # Asked of every module, because the transformers model may lie inside a wrapper (LoRA).
    named: set[str] = set()
    for module in model.modules():
        named.update(getattr(module, "_no_split_modules", None) or ())
    return named


def _outermost(module: nn.Module, classes: set[str]) -> Iterator[nn.Module]:
    for child in module.children():
        if type(child).__name__ in classes:
            yield child
        else:
            yield from _outermost(child, classes)


def _largest_list(model: nn.Module) -> list[nn.Module]:
    candidates = [
        list(module)
        for module in model.modules()
        if isinstance(module, nn.ModuleList) and len({type(member) for member in module}) == 1
    ]
    return max(candidates, key=_count_elements, default=[])


def _count_elements(modules: list[nn.Module]) -> int:
    return sum(parameter.numel() for module in modules for parameter in module.parameters())


def _shares_parameters(layer: nn.Module, model: nn.Module) -> bool:
    uses = Counter(
        id(parameter)
        for module in model.modules()
        for parameter in module._parameters.values()
        if parameter is not None
    )
    inside = Counter(
        id(parameter)
        for module in layer.modules()
        for parameter in module._parameters.values()
        if parameter is not None
    )
    return any(uses[identity] > count for identity, count in inside.items())


def _repeated_classes(model: nn.Module) -> list[str]:
    counts = Counter(
        type(member).__name__
        for module in model.modules()
        if isinstance(module, nn.ModuleList) and len({type(member) for member in module}) == 1
        for member in module
    )
    return [name for name, _ in counts.most_common()]
