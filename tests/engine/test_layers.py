from __future__ import annotations

import pytest
from torch import nn

from bigtrain.engine.layers import find_layers
from bigtrain.errors import ConfigError
from tests.engine import recipes
from tests.engine.recipes import Recipe


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)


class Plain(nn.Module):
    """A model that says nothing about how it may be split."""

    def __init__(self) -> None:
        super().__init__()
        self.small = nn.ModuleList([nn.LayerNorm(2), nn.LayerNorm(2)])
        self.blocks = nn.ModuleList([Block() for _ in range(3)])
        self.mixed = nn.ModuleList([nn.Linear(99, 99), nn.LayerNorm(99)])


def test_a_transformers_model_names_its_own_layers() -> None:
    model = recipes.make_model(Recipe())
    assert find_layers(model) == list(model.model.layers)  # type: ignore[union-attr, arg-type]


def test_the_largest_list_of_equal_modules_stands_in_for_layers() -> None:
    model = Plain()
    assert find_layers(model) == list(model.blocks)


def test_classes_that_are_given_win() -> None:
    model = Plain()
    assert find_layers(model, ("LayerNorm",)) == [*model.small, model.mixed[1]]


def test_a_class_that_is_not_there_is_refused_with_those_that_are() -> None:
    with pytest.raises(ConfigError, match="no Blok; its repeated classes are Block, LayerNorm"):
        find_layers(Plain(), ("Blok",))


def test_a_layer_that_shares_a_parameter_stays_with_the_root() -> None:
    model = Plain()
    model.blocks[0].inner.weight = model.blocks[1].inner.weight  # type: ignore[union-attr, assignment]
    assert find_layers(model) == [model.blocks[2]]


def test_a_model_without_layers_is_one_unit() -> None:
    assert find_layers(nn.Linear(2, 2)) == []
