"""Config classes read from source, against the classes themselves."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import pytest

from bigtrain.arguments import model_fields
from bigtrain.arguments.model_fields import config_class, config_faults, read_config, too_long

_DECODERS = ("llama", "mistral", "mixtral", "qwen2", "qwen3", "gpt2", "gemma2", "phi", "opt")


def _differences(model_types: list[str]) -> dict[str, set[str]]:
    """Fields that the class has and the source was not found to, by `model_type`."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    wrong: dict[str, set[str]] = {}
    for model_type in model_types:
        read, real = config_class(model_type), CONFIG_MAPPING[model_type]
        if read is None:  # inherits from another model's: nothing is said of its keys
            continue
        names = {field.name for field in dataclasses.fields(real)} | set(real.attribute_map)
        found = {*read.annotations, *read.other_names, *model_fields._base_fields()}
        if names - found:
            wrong[model_type] = names - found
    return wrong


def test_the_fields_of_the_usual_decoders_are_those_of_their_classes() -> None:
    assert all(config_class(model_type) for model_type in _DECODERS)
    assert _differences(list(_DECODERS)) == {}


def test_the_causal_models_are_those_of_transformers() -> None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    assert model_fields._causal_models().keys() == MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.keys()


@pytest.mark.parametrize("kind", ["pipe", "device", "large"])
def test_a_config_that_is_no_small_file_is_not_read(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        path.write_text(f'{{"a": "{"a" * (17 << 20)}"}}')

    assert read_config(tmp_path) == {}


@pytest.mark.slow
def test_no_class_of_transformers_has_a_field_that_would_be_refused() -> None:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    assert _differences(list(CONFIG_MAPPING)) == {}


@pytest.mark.parametrize("model_type", _DECODERS)
def test_the_defaults_are_those_of_the_class(model_type: str) -> None:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    read, real = config_class(model_type), CONFIG_MAPPING[model_type]
    assert read is not None
    defaults = {field.name: field.default for field in dataclasses.fields(real)}
    assert {name: defaults[name] for name in read.defaults} == dict(read.defaults)
    assert list(config_faults({"model_type": model_type}, sequence_length=16)) == []


@pytest.mark.parametrize(
    ("config", "faults"),
    [
        ({"model_type": "lama"}, {"model_type": "'lama' is unknown; did you mean 'llama'?"}),
        (
            {"model_type": "llama", "hiden_size": 3},
            {"hiden_size": "unknown key; did you mean 'hidden_size'?"},
        ),
        (
            {"model_type": "llama", "hidden_size": "64", "use_cache": 1},
            {"hidden_size": "'64' is not a whole number", "use_cache": "1 is not true or false"},
        ),
        (
            {"model_type": "llama", "hidden_size": 64, "num_attention_heads": 12},
            {"num_attention_heads": "12 heads do not divide the hidden size 64; use 8 or 16"},
        ),
        (
            {"model_type": "llama", "num_hidden_layers": -1, "vocab_size": 64},
            {"num_hidden_layers": "-1 is too small; it must be at least 1"},
        ),
        (
            {"model_type": "llama", "num_hidden_layers": 10**9},
            {"num_hidden_layers": "1000000000 layers are too many; give at most 2000"},
        ),
        (
            {"model_type": "gpt2", "n_layer": 2001},
            {"n_layer": "2001 layers are too many; give at most 2000"},
        ),
        (
            {"model_type": "t5"},
            {
                "model_type": "'t5' is no causal language model in transformers, and a run file "
                "trains one"
            },
        ),
        (
            {"model_type": "gpt2", "n_layer": 0},
            {"n_layer": "0 is too small; it must be at least 1"},
        ),
        (
            {"model_type": "qwen3", "num_attention_heads": 12, "num_key_value_heads": 5},
            {"num_key_value_heads": "5 do not divide the 12 attention heads; use 4 or 6"},
        ),
        (
            {"model_type": "gpt2", "n_embd": 100, "n_head": 12},
            {"n_head": "12 heads do not divide the hidden size 100; use 10 or 20"},
        ),
        (
            {"model_type": "gpt2", "n_positions": 64},
            {
                "n_positions": "the model has 64 positions (max_position_embeddings), but "
                "data.sequence_length is 128; make one fit the other"
            },
        ),
        # Older spellings, fields of the base class, and heads of a width of their own.
        ({"model_type": "llama", "rope_theta": 1e4, "dtype": "bfloat16"}, {}),
        ({"model_type": "qwen3", "hidden_size": 100, "num_attention_heads": 32}, {}),
    ],
)
def test_what_a_model_can_not_be_is_named(config: dict[str, Any], faults: dict[str, str]) -> None:
    assert dict(config_faults(config, sequence_length=128)) == faults


def test_positions_of_a_text_model_inside_another_count() -> None:
    config = {"model_type": "llava", "text_config": {"model_type": "llama"}}

    assert too_long(config, 2048) == ""
    assert too_long(config, 2049).startswith("the model has 2048 positions")
