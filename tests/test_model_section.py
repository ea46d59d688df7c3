from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from bigtrain.errors import ConfigError
from bigtrain.model_section import ModelFactory, load_tokenizer, model_factory

TINY = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}


def factory(tokenizer: object, section: dict[str, Any], **changes: Any) -> ModelFactory:
    options = {"sequence_length": 16, "seed": 3, "root": Path.cwd(), **changes}
    return model_factory(section, tokenizer=tokenizer, **options)


def test_the_same_seed_makes_the_same_model_and_leaves_the_generator_alone(byte_tokenizer) -> None:
    make = factory(byte_tokenizer, {"config": TINY})
    state = torch.get_rng_state()

    one, two = make(), make()
    other = factory(byte_tokenizer, {"config": TINY}, seed=4)()

    assert torch.equal(torch.get_rng_state(), state)
    for name, parameter in one.named_parameters():
        assert torch.equal(parameter, two.get_parameter(name)), name
    assert not torch.equal(one.lm_head.weight, other.lm_head.weight)


def test_what_the_config_leaves_open_comes_from_the_tokenizer(byte_tokenizer) -> None:
    config = factory(byte_tokenizer, {"config": TINY}).config

    assert config.vocab_size == len(byte_tokenizer)
    assert config.eos_token_id == byte_tokenizer.eos_token_id


@pytest.mark.parametrize("section", [{"config": TINY}, {"config": TINY, "dtype": "bf16"}])
def test_a_skeleton_has_the_models_names_shapes_and_dtypes_and_no_storage(
    byte_tokenizer, section: dict[str, Any]
) -> None:
    make = factory(byte_tokenizer, section)
    whole, skeleton = make(), make.skeleton()

    def described(model: torch.nn.Module) -> list[tuple[str, torch.Size, torch.dtype]]:
        return [(name, value.shape, value.dtype) for name, value in model.state_dict().items()]

    assert described(whole) == described(skeleton)
    assert {parameter.device.type for parameter in skeleton.parameters()} == {"meta"}


def test_saved_weights_are_loaded_in_the_dtype_they_are_stored_in(
    byte_tokenizer, tmp_path: Path
) -> None:
    model = factory(byte_tokenizer, {"config": TINY, "dtype": "bf16"})()
    model.save_pretrained(tmp_path / "model")

    make = factory(byte_tokenizer, {"name": "model"}, root=tmp_path)
    loaded = make()

    assert loaded.dtype == make.skeleton().dtype == torch.bfloat16
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)
    fp32 = factory(byte_tokenizer, {"name": "model", "dtype": "fp32"}, root=tmp_path)
    assert fp32().dtype == torch.float32


def test_the_models_own_tokenizer_is_taken_where_none_is_named(
    byte_tokenizer, tmp_path: Path
) -> None:
    byte_tokenizer.save_pretrained(tmp_path / "model")

    loaded = load_tokenizer({}, model={"name": "model"}, root=tmp_path)

    assert loaded.get_vocab() == byte_tokenizer.get_vocab()


@pytest.mark.parametrize(
    ("section", "message"),
    [
        (
            {"config": {**TINY, "model_type": "lama"}},
            "model.config.model_type: 'lama' is unknown; did you mean 'llama'?",
        ),
        (
            {"config": {**TINY, "hiden_size": 3}},
            "model.config.hiden_size: unknown key; did you mean 'hidden_size'?",
        ),
        (
            {"config": {**TINY, "hidden_size": 30}},
            "model.config.num_attention_heads: 4 heads do not divide the hidden size 30",
        ),
        ({"config": {**TINY, "hidden_size": "wide"}}, "model.config.hidden_size: 'wide' is not"),
        (
            {"config": {**TINY, "vocab_size": 100}},
            "vocab_size is 100, but its tokenizer has 257 tokens",
        ),
        ({"config": {**TINY, "max_position_embeddings": 8}}, "data.sequence_length is 16"),
        ({"name": "./nowhere"}, "nowhere is not a directory"),
        ({"name": "empty"}, "empty has no config.json; it holds notes.txt"),
    ],
)
def test_what_cannot_be_made_is_named(
    byte_tokenizer, tmp_path: Path, section: dict[str, Any], message: str
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.txt").write_text("")

    with pytest.raises(ConfigError) as raised:
        factory(byte_tokenizer, section, root=tmp_path)

    assert message in str(raised.value)


def test_all_unknown_fields_are_named_at_once(byte_tokenizer) -> None:
    with pytest.raises(ConfigError) as raised:
        factory(byte_tokenizer, {"config": {**TINY, "hiden_size": 3, "layers": 2}})

    assert len(raised.value.faults) == 2


def test_a_hub_that_cannot_be_reached_is_said(byte_tokenizer, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model\.name: no/such can't be loaded"):
        factory(byte_tokenizer, {"name": "no/such"}, root=tmp_path)
    with pytest.raises(ConfigError, match=r"tokenizer\.name: no/such can't be loaded"):
        load_tokenizer({"name": "no/such"}, model={}, root=tmp_path)
