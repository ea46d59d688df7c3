"""Names come out as `from_pretrained` needs them."""

from __future__ import annotations

import pytest

from bigtrain.checkpoint.consolidate.naming import plain_names
from bigtrain.errors import CheckpointError


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
