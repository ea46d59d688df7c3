"""Names come out as `from_pretrained` needs them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from bigtrain.checkpoint.consolidate import consolidate
from bigtrain.checkpoint.consolidate.naming import plain_names
from bigtrain.checkpoint.source import open_source
from bigtrain.errors import CheckpointError
from tests.checkpoint.consolidate.test_consolidate import save_on
from tests.checkpoint.stand_in import run_ranks


@pytest.mark.parametrize(
    ("stored", "expected"),
    [
        (["model.embed.weight", "lm_head.weight"], ["model.embed.weight", "lm_head.weight"]),
        (["model.layers.0.w"], ["model.layers.0.w"]),
        (["module.a", "module.b.w"], ["a", "b.w"]),
        (["_orig_mod.a.w", "_orig_mod.b._orig_mod.w"], ["a.w", "b.w"]),
        (["model._fsdp_wrapped_module.w", "lm_head.w"], ["model.w", "lm_head.w"]),
        (
            ["_forward_module.model.model.w", "_forward_module.model.lm_head.w"],
            ["model.w", "lm_head.w"],
        ),
        (["model.model.layers.0.w", "model.lm_head.w"], ["model.layers.0.w", "lm_head.w"]),
    ],
)
def test_wrappers_leave_no_trace(stored: list[str], expected: list[str]) -> None:
    assert list(plain_names(stored).values()) == expected


def test_a_prefix_can_be_given() -> None:
    assert plain_names(["net.a", "net.b"], prefix="net.") == {"net.a": "a", "net.b": "b"}
    with pytest.raises(CheckpointError, match=r"x does not begin with the prefix 'net\.'"):
        plain_names(["net.a", "x"], prefix="net.")


def test_two_tensors_never_get_one_name() -> None:
    with pytest.raises(CheckpointError, match=r"a\.w and a\._orig_mod\.w would both be named a\.w"):
        plain_names(["a.w", "a._orig_mod.w"])


@pytest.mark.parametrize("first", ["model.transformer.wte.weight", "model.model.w", "module.w"])
def test_names_that_are_the_models_own_stay(first: str, tmp_path: Path) -> None:
    """LLaDA and OLMo begin every name with `model.transformer.`; a module may be named so."""
    (tmp_path / "in").mkdir()
    save_file({first: torch.ones(2)}, tmp_path / "in" / "model.safetensors")
    (tmp_path / "in" / "config.json").write_text("{}")
    consolidate(tmp_path / "in", tmp_path / "out")
    assert list(load_file(tmp_path / "out" / "model.safetensors")) == [first]


def test_own_checkpoints_have_the_models_own_names(tmp_path: Path) -> None:
    run_ranks(1, save_on, tmp_path / "checkpoint-3")
    assert open_source(tmp_path).has_plain_names


def test_a_model_in_a_model_is_not_always_a_wrappers() -> None:
    names = ["model.transformer.wte.weight", "model.transformer.ff_out.weight"]
    assert list(plain_names(names).values()) == names
