"""A model as memory sees it: its parameters, by layer, and the widths of its activations."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

from bigtrain.checkpoint.dtypes import DTYPES

BYTES: Mapping[str, int] = {
    **{name: dtype.itemsize for name, dtype in DTYPES.items()},
    "fp32": 4,
    "bf16": 2,
    "fp16": 2,
}
"""Bytes of one element, by torch's names and by a run file's words."""

_LAYER = re.compile(r"^(.*?\.)?(\d+)\.")
# As transformers' Trainer names what gets no weight decay (`get_decay_parameter_names`).
_NOT_DECAYED = re.compile(r"bias|layernorm|rmsnorm|(?:^|\.)norm(?:$|\.)|_norm(?:$|\.)", re.I)


@dataclass(frozen=True, kw_only=True)
class Parameter:
    """One tensor of the model; a tied one is counted once."""

    name: str
    shape: tuple[int, ...]
    dtype: str = "fp32"
    """As it is loaded; what training makes of it is the engine's affair."""
    trained: bool = True
    is_transposed: bool = False
    """True of a `Conv1D`'s weight, as in GPT-2: (in, out), where a `Linear` has (out, in)."""

    @cached_property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def bytes_loaded(self) -> int:
        return self.numel * BYTES[self.dtype]

    @cached_property
    def is_decayed(self) -> bool:
        """True where it is in the optimizer's group with weight decay."""
        name = self.name.rpartition(".")[0] if self.name.endswith(".weight") else self.name
        return not (_NOT_DECAYED.search(self.name) or (len(self.shape) == 1 and "ln_" in name))

    @cached_property
    def layer(self) -> str:
        """The repeated layer it belongs to, `model.layers.3`; empty outside of any."""
        found = _LAYER.match(self.name)
        return f"{found[1] or ''}{found[2]}" if found else ""


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """The widths that activations follow, for a decoder of the usual build."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int
    experts: int = 0
    experts_per_token: int = 0
    has_qk_norm: bool = False
    is_gated: bool = True
    is_measured: bool = True
    """Whether the formula of activations was compared with models of this family."""


@dataclass(frozen=True, kw_only=True)
class ModelShapes:
    """All parameters in the model's order, and from where they are known."""

    parameters: tuple[Parameter, ...]
    source: str
    """`formula for llama`, `headers of model.safetensors`, `the model on the meta device`."""
    architecture: Architecture | None = None

    @cached_property
    def numel(self) -> int:
        return sum(parameter.numel for parameter in self.parameters)

    @cached_property
    def trained_numel(self) -> int:
        return sum(parameter.numel for parameter in self.parameters if parameter.trained)

    @cached_property
    def units(self) -> tuple[tuple[Parameter, ...], ...]:
        """What a sharding engine gathers at a time: the root's own parameters, then each layer's.

        The layers are those of the list with the most elements, as `engine/layers.py` finds them.
        """
        layers: dict[str, list[Parameter]] = {name: [] for name in _main_layers(self.parameters)}
        root: list[Parameter] = []
        for parameter in self.parameters:
            layers.get(parameter.layer, root).append(parameter)
        return (tuple(root), *(tuple(members) for members in layers.values()))


def elements(parameters: Iterable[Parameter]) -> int:
    """The number of elements of all of them."""
    return sum(parameter.numel for parameter in parameters)


def _main_layers(parameters: Iterable[Parameter]) -> list[str]:
    sizes: dict[str, int] = {}
    for parameter in parameters:
        if parameter.layer:
            sizes[parameter.layer] = sizes.get(parameter.layer, 0) + parameter.numel
    lists: dict[str, int] = {}
    for layer, size in sizes.items():
        owner = layer.rpartition(".")[0]
        lists[owner] = lists.get(owner, 0) + size
    largest = max(lists, key=lambda owner: lists[owner], default=None)
    return [layer for layer in sizes if layer.rpartition(".")[0] == largest]
