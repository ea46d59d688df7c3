"""Where parameter shapes come from: formula, weight files, the model itself; they all agree."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, LlamaModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from bigtrain.errors import ConfigError
from bigtrain.memory.adapters import with_adapters
from bigtrain.memory.discovery import find_model, local_folder, read_parameter
from bigtrain.memory.families import FAMILIES, architecture, from_formula
from bigtrain.memory.known_models import KNOWN_MODELS
from bigtrain.memory.questions import Asker
from bigtrain.memory.shapes import ModelShapes
from bigtrain.memory.weight_files import from_weight_files

_SMALL: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 50,
}


def _real(model_type: str, **fields: Any) -> Any:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(CONFIG_MAPPING[model_type](**fields))


def _named(shapes: ModelShapes) -> list[tuple[str, tuple[int, ...]]]:
    return [(parameter.name, parameter.shape) for parameter in shapes.parameters]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "more",
    [{}, {"tie_word_embeddings": True}, {"attention_bias": True, "mlp_bias": True}],
    ids=["plain", "tied", "biases"],
)
def test_a_formula_gives_the_very_parameters_of_the_model(
    family: str, more: dict[str, Any]
) -> None:
    known = CONFIG_MAPPING[family]().to_dict()
    fields = _SMALL | {key: value for key, value in more.items() if key in known}
    model = _real(family, **fields)

    shapes = from_formula({"model_type": family, **fields}, dtype="fp32")

    assert shapes is not None
    assert _named(shapes) == [(name, tuple(p.shape)) for name, p in model.named_parameters()]


@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_config_leaves_open_has_the_class_s_default(family: str) -> None:
    shapes = from_formula({"model_type": family}, dtype="fp32")

    assert shapes is not None
    assert shapes.numel == _real(family).num_parameters()


@pytest.mark.parametrize(
    ("name", "numel"),
    [
        ("meta-llama/Meta-Llama-3-8B", 8_030_261_248),
        ("meta-llama/Meta-Llama-3-70B", 70_553_706_496),
        ("Qwen/Qwen2.5-7B", 7_615_616_512),
        ("Qwen/Qwen3-0.6B", 596_049_920),
        ("mistralai/Mixtral-8x7B-v0.1", 46_702_792_704),
    ],
)
def test_known_models_have_their_published_size(name: str, numel: int) -> None:
    shapes = from_formula(KNOWN_MODELS[name], dtype="bf16")

    assert shapes is not None
    assert shapes.numel == numel


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_weight_files_give_the_modules_shapes(family: str, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[family](**_SMALL))
    model.save_pretrained(tmp_path, max_shard_size="20KB")

    config = json.loads((tmp_path / "config.json").read_text())
    stored = from_weight_files(tmp_path, config, dtype=None)

    assert stored is not None and stored.is_exact
    assert stored.shapes.source.endswith("safetensors files")
    real = {name: tuple(p.shape) for name, p in model.named_parameters()}
    assert dict(_named(stored.shapes)) == real
    assert {parameter.dtype for parameter in stored.shapes.parameters} == {"float32"}


def _find(
    section: dict[str, Any],
    folder: Path,
    *,
    tokenizer: Mapping[str, Any] = MappingProxyType({"kind": "bytes"}),
    asks: bool = True,
    **environment: str,
) -> Any:
    return find_model(
        section,
        tokenizer=tokenizer,
        working_dir=folder,
        environment={"PATH": "", "XDG_CACHE_HOME": str(folder / "cache"), **environment},
        asks=asks,
    )


def test_a_family_without_a_formula_is_asked_once(tmp_path: Path) -> None:
    fields = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 60, "n_positions": 16}
    section = {"config": {"model_type": "gpt2", **fields}}

    found = _find(section, tmp_path)

    assert found.shapes.source == "the model on the meta device"
    assert found.shapes.numel == _real("gpt2", **fields).num_parameters()
    assert found.shapes.architecture.hidden == 32
    # The answer is there now: no process could be started in an environment like this.
    assert _find(section, tmp_path, PYTHONHOME="/nowhere").shapes == found.shapes


def test_a_kept_answer_that_is_damaged_is_asked_for_again(tmp_path: Path) -> None:
    question = {"kind": "shapes"}
    parameter = {"name": "a", "shape": [2, 3], "dtype": "float32"}
    right = {"parameters": [parameter | {"trained": True, "transposed": False}]}
    asked: list[str] = []

    class Counting(Asker):
        def _run(self, text: str) -> Any:
            asked.append(text)
            return right

    asker = Counting(cache=tmp_path, environment={})

    def read(answer: Any) -> Any:
        return read_parameter(answer["parameters"][0])

    first = asker.ask(question, read=read)
    (kept,) = tmp_path.iterdir()
    wrong = json.loads(kept.read_text())["parameters"][0]
    for damaged in ("", "[]", "{}", "[" * 100_000, *_spoilt(wrong)):
        kept.write_text(damaged)
        assert asker.ask(question, read=read) == first
    assert asker.ask(question, read=read) == first
    assert len(asked) == 1 + 4 + 4


def _spoilt(parameter: dict[str, Any]) -> Iterator[str]:
    for more in ({"shape": 3}, {"shape": [2, -3]}, {"shape": [2, 3.5]}, {"dtype": "float33"}):
        yield json.dumps({"parameters": [parameter | more]})


def test_a_model_that_can_not_be_made_is_told_in_the_words_of_what_refused_it(
    tmp_path: Path,
) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "t5"}')

    found = _find({"name": str(tmp_path)}, tmp_path)

    assert found.shapes is None and found.is_refused
    assert found.why.startswith(
        "model: it can't be built to measure its memory: ValueError: Unrecognized configuration "
        "class <class 'transformers.models.t5.configuration_t5.T5Config'> for this kind of "
        "AutoModel: AutoModelForCausalLM."
    )


def _saved(folder: Path, model_type: str, **fields: Any) -> Path:
    config = CONFIG_MAPPING[model_type](**(_SMALL | fields))
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def _with_more(folder: Path, **tensors: torch.Tensor) -> None:
    file = folder / "model.safetensors"
    save_file(load_file(file) | tensors, file, metadata={"format": "pt"})


def _tied_with_its_head(folder: Path) -> None:
    _saved(folder, "llama", tie_word_embeddings=True)
    head = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    frequencies = {f"model.layers.{k}.self_attn.rotary_emb.inv_freq": torch.ones(6) for k in (0, 1)}
    _with_more(folder, **{"lm_head.weight": head}, **frequencies)


def _base_model(folder: Path) -> None:
    LlamaModel(CONFIG_MAPPING["llama"](**_SMALL)).save_pretrained(folder)


def _fewer_layers_than_stored(folder: Path) -> None:
    config = json.loads((_saved(folder, "llama") / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}))


def _as_gpt2_on_the_hub(folder: Path) -> None:
    """Without the prefix, and with the causal masks that were buffers once."""
    file = _saved(folder, "gpt2") / "model.safetensors"
    stored = load_file(file)
    bare = {name.removeprefix("transformer."): tensor for name, tensor in stored.items()}
    masks = {f"h.{k}.attn.bias": torch.ones(1, 1, 64, 64) for k in (0, 1)}
    save_file(bare | masks, file, metadata={"format": "pt"})


def _untied_bias(folder: Path) -> None:
    _saved(folder, "qwen2", tie_word_embeddings=False)


def _bert(folder: Path) -> None:
    _saved(folder, "bert", is_decoder=True)
    _with_more(folder, **{"bert.pooler.dense.weight": torch.ones(48, 48)})


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("write", "asks"),
    [
        (_tied_with_its_head, True),
        (_base_model, True),
        (_fewer_layers_than_stored, True),
        (_untied_bias, True),
        (_as_gpt2_on_the_hub, True),
        (_as_gpt2_on_the_hub, False),
        (_bert, True),
    ],
)
def test_a_directory_has_the_parameters_that_are_loaded_from_it(
    write: Any, asks: bool, tmp_path: Path
) -> None:
    write(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)

    shapes = _find({"name": str(tmp_path)}, tmp_path, asks=asks).shapes

    assert shapes.numel == loaded.num_parameters()
    if asks:
        assert _named(shapes) == [(n, tuple(p.shape)) for n, p in loaded.named_parameters()]


@pytest.mark.parametrize("model_type", ["gpt2", "gpt_neox", "opt"])
def test_a_family_without_a_formula_is_known_at_once_from_files_that_hold_it(
    model_type: str, tmp_path: Path
) -> None:
    _saved(tmp_path, model_type, word_embed_proj_dim=48)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)

    shapes = _find({"name": str(tmp_path)}, tmp_path, PYTHONHOME="/nowhere").shapes

    assert shapes.source == "headers of model.safetensors"
    # A name may be an older one, which transformers changes as it loads.
    found = sorted(shape for _, shape in _named(shapes))
    assert found == sorted(tuple(parameter.shape) for parameter in loaded.parameters())


@pytest.mark.parametrize("write", [_base_model, lambda folder: _saved(folder, "llama")])
def test_weights_of_another_shape_than_the_config_s_are_refused(write: Any, tmp_path: Path) -> None:
    write(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"vocab_size": 60}))

    with pytest.raises(ConfigError) as raised:
        _find({"name": str(tmp_path)}, tmp_path)

    assert str(raised.value) == (
        f"model.name: {tmp_path}: model.embed_tokens.weight is 50 × 48 in its weight files, but "
        "60 × 48 by its config.json; give the config.json that belongs to these weights"
    )


def test_another_config_in_the_same_place_is_asked_anew(tmp_path: Path) -> None:
    for layers in (1, 2):
        config = {"model_type": "gpt2", "n_embd": 32, "n_head": 4, "n_layer": layers}
        (tmp_path / "config.json").write_text(json.dumps(config))

        shapes = _find({"name": str(tmp_path)}, tmp_path).shapes

        assert len(shapes.units) == 1 + layers


@pytest.mark.parametrize(
    "index", ["{", "[]", '{"weight_map": {"a": 3}}', '{"weight_map": {"a": "../a.safetensors"}}']
)
def test_a_damaged_index_of_weights_is_named(index: str, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(index)

    with pytest.raises(ConfigError) as raised:
        from_weight_files(tmp_path, {"model_type": "llama"}, dtype=None)

    assert str(raised.value).startswith(f"model.name: {tmp_path}/model.safetensors.index.json: ")


def test_a_type_of_elements_that_is_none_is_passed_over(tmp_path: Path) -> None:
    config = {"model_type": "llama", **_SMALL, "torch_dtype": "float33"}
    (tmp_path / "config.json").write_text(json.dumps(config))

    found = _find({"name": str(tmp_path)}, tmp_path)

    assert {parameter.dtype for parameter in found.shapes.parameters} == {"fp32"}


def test_a_model_that_is_not_here_is_not_guessed(tmp_path: Path) -> None:
    found = _find({"name": "somebody/something"}, tmp_path, HF_HOME=str(tmp_path))

    assert found.shapes is None
    assert found.why == (
        "somebody/something is not on this machine yet; download it, or give a local path"
    )


def test_a_model_in_the_hub_s_cache_is_found(tmp_path: Path) -> None:
    repository = tmp_path / "hub" / "models--a--b"
    snapshot = repository / "snapshots" / "c0ffee"
    AutoModelForCausalLM.from_config(CONFIG_MAPPING["llama"](**_SMALL)).save_pretrained(snapshot)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("c0ffee")

    found = _find({"name": "a/b", "dtype": "bf16"}, tmp_path, HF_HOME=str(tmp_path))

    assert found.shapes.source == "headers of model.safetensors"
    assert found.shapes.parameters[0].dtype == "bf16"
    assert found.shapes.numel == _real("llama", **_SMALL).num_parameters()


@pytest.mark.parametrize(
    "said",
    [
        {},
        {"HF_HOME": "~/hf"},
        {"HF_HOME": "$HOME/${ELSE}/hf"},
        {"HF_HOME": ""},
        {"XDG_CACHE_HOME": "xdg"},
        {"HUGGINGFACE_HUB_CACHE": "old", "HF_HOME": "hf"},
        {"HUGGINGFACE_HUB_CACHE": "old", "HF_HUB_CACHE": "~/new"},
    ],
)
def test_the_hub_s_cache_is_where_huggingface_hub_has_it(
    said: dict[str, str], tmp_path: Path
) -> None:
    code = "from huggingface_hub import constants; print(constants.HF_HUB_CACHE)"
    environment = {"HOME": str(tmp_path / "home"), "ELSE": "else", **said}
    cache = subprocess.check_output([sys.executable, "-c", code], env=environment, text=True)
    snapshot = tmp_path / cache.strip() / "models--a--b" / "snapshots" / "c0ffee"
    snapshot.mkdir(parents=True)

    assert local_folder("a/b", "c0ffee", tmp_path, environment) == snapshot


def test_the_byte_tokenizer_sizes_a_vocabulary_that_is_not_said(tmp_path: Path) -> None:
    found = _find({"config": {"model_type": "llama", "hidden_size": 64}}, tmp_path)

    assert found.shapes.architecture.vocabulary == 257


@pytest.mark.parametrize(
    "model",
    [
        models.WordLevel({"a": 0, "b": 1, "<unk>": 2}, unk_token="<unk>"),
        models.Unigram([("<unk>", 0.0), ("a", -1.0), ("b", -2.0), ("c", -3.0)], unk_id=0),
    ],
    ids=["a mapping", "a list with scores"],
)
def test_a_tokenizer_s_size_is_counted_in_its_file(model: Any, tmp_path: Path) -> None:
    tokenizer = Tokenizer(model)
    tokenizer.add_special_tokens(["<unk>", "<pad>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))

    shapes = _find(_SCRATCH, tmp_path, tokenizer={"name": str(tmp_path)}).shapes

    assert shapes.architecture.vocabulary == tokenizer.get_vocab_size(with_added_tokens=True)
    assert shapes.source == "formula for llama"


def test_a_tokenizer_whose_size_is_not_known_is_said_so(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text('{"model": {"vocab": 3}}')

    shapes = _find(_SCRATCH, tmp_path, tokenizer={"name": str(tmp_path)}).shapes

    assert shapes.source == (
        "formula for llama, with its default vocab_size: the tokenizer's size is not known here"
    )


_SCRATCH = {"config": {"model_type": "llama", "hidden_size": 64}}


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
def test_layers_without_end_are_not_counted_one_by_one(family: str, tmp_path: Path) -> None:
    """As of a model in the hub's cache, whose config is not judged before."""
    text = {"model_type": "gemma3_text", "num_hidden_layers": 10**9}
    config = {"model_type": family, "num_hidden_layers": 10**9, "text_config": text}
    (tmp_path / "config.json").write_text(json.dumps(config))

    found = _find({"name": str(tmp_path)}, tmp_path)

    assert found.shapes is None
    assert found.why == "its config: 1000000000 layers are too many; give at most 2000"


def test_layers_are_the_units_and_the_rest_is_the_root() -> None:
    shapes = from_formula({"model_type": "llama", **_SMALL}, dtype="fp32")

    assert shapes is not None
    root, *layers = shapes.units
    assert [parameter.name for parameter in root] == [
        "model.embed_tokens.weight",
        "model.norm.weight",
        "lm_head.weight",
    ]
    assert len(layers) == 2
    assert sum(map(len, shapes.units)) == len(shapes.parameters)


@pytest.mark.parametrize(
    ("family", "targets"),
    [
        ("llama", ["q_proj", "down_proj"]),
        ("llama", ["self_attn.q_proj"]),
        ("llama", ["model.layers.0.self_attn.q_proj", "layers.1.mlp.up_proj", "proj"]),
        ("gpt2", ["c_attn", "mlp.c_fc"]),
    ],
)
def test_lora_s_shapes_are_peft_s(family: str, targets: list[str], tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    lora = {"rank": 4, "alpha": 8, "dropout": 0.0, "target_modules": targets}
    config = peft.LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM")
    model = peft.get_peft_model(_real(family, **_SMALL), config)

    shapes = _find({"config": {"model_type": family, **_SMALL}}, tmp_path).shapes
    adapted = with_adapters(shapes, lora)

    real = {name: (tuple(p.shape), p.requires_grad) for name, p in model.named_parameters()}
    assert {p.name: (p.shape, p.trained) for p in adapted.parameters} == real


def test_lora_on_no_module_of_the_model_is_refused() -> None:
    shapes = from_formula({"model_type": "llama", **_SMALL}, dtype="fp32")

    assert shapes is not None
    with pytest.raises(ConfigError) as raised:
        with_adapters(shapes, {"rank": 4, "target_modules": ["attn.q_proj", "proj"]})

    assert str(raised.value) == (
        "model.lora.target_modules: the model has no module named attn.q_proj, proj"
    )


@pytest.mark.parametrize(
    "wrong",
    [
        {"hidden_size": "wide"},
        {"num_attention_heads": 0},
        {"num_hidden_layers": 10**19},
        {"num_key_value_heads": -1},
        {"num_local_experts": "x"},
    ],
)
def test_a_config_with_a_width_that_is_none_has_no_formula(wrong: dict[str, Any]) -> None:
    assert from_formula({"model_type": "mixtral", **_SMALL, **wrong}, dtype="fp32") is None


def test_an_unknown_width_is_not_made_up() -> None:
    assert architecture({"model_type": "resnet"}) is None


def test_a_family_that_the_formula_was_not_compared_with_is_marked() -> None:
    known = architecture({"model_type": "llama"})
    other = architecture({"model_type": "gpt2"})

    assert known is not None and known.is_measured
    assert other is not None and not other.is_measured
