"""Parameters by formula, for the decoder families that the ready configs use.

What a config leaves open has the default of the installed transformers' own config class, read
from its source. Names and shapes are those of transformers' modules; a test compares each family
with the model itself on the meta device.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, TypeAlias

from bigtrain.arguments.model_fields import config_class
from bigtrain.memory.shapes import Architecture, ModelShapes, Parameter

Config: TypeAlias = Mapping[str, Any]
_Named: TypeAlias = Iterator[tuple[str, tuple[int, ...]]]
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "mixtral")
"""Values of `model_type` that `from_formula` knows."""
_WIDTHS = (
    *("hidden_size", "intermediate_size", "vocab_size", "num_hidden_layers"),
    *("num_attention_heads", "num_key_value_heads", "head_dim", "num_local_experts"),
)
_WIDEST = 2**31


def from_formula(config: Config, *, dtype: str) -> ModelShapes | None:
    """The causal language model that `config` describes; None for a family that is not known, and
    where a width is none, so that transformers itself says what is wrong with it."""
    family = str(config.get("model_type"))
    if family not in FAMILIES:
        return None
    whole = complete(config)
    widths = (whole[name] for name in _WIDTHS if whole.get(name) is not None)
    if not all(isinstance(width, int) and 0 < width < _WIDEST for width in widths):
        return None
    parameters = tuple(
        Parameter(name=name, shape=shape, dtype=dtype) for name, shape in _model(family, whole)
    )
    return ModelShapes(
        parameters=parameters, source=f"formula for {family}", architecture=architecture(whole)
    )


def architecture(config: Config) -> Architecture | None:
    """The widths of a decoder that names them as Llama does (or GPT-2), whatever its family."""
    inner = config.get("text_config")
    whole = complete({**config, **inner} if isinstance(inner, Mapping) else config)

    def read(*names: str, default: int | None = None) -> int | None:
        found = (whole.get(name) for name in names)
        return next((int(value) for value in found if isinstance(value, int)), default)

    hidden, layers = read("hidden_size", "n_embd"), read("num_hidden_layers", "n_layer")
    heads, vocabulary = read("num_attention_heads", "n_head"), read("vocab_size")
    if not (hidden and layers and heads and vocabulary):
        return None
    experts = read("num_local_experts", "num_experts", default=0) or 0
    width = read("moe_intermediate_size") if experts else None
    return Architecture(
        hidden=hidden,
        layers=layers,
        heads=heads,
        kv_heads=read("num_key_value_heads", default=heads) or heads,
        head_dim=read("head_dim", default=hidden // heads) or hidden // heads,
        intermediate=width or read("intermediate_size", "n_inner", default=4 * hidden) or 0,
        vocabulary=vocabulary,
        experts=experts,
        experts_per_token=(read("num_experts_per_tok", default=1) or 1) if experts else 0,
        has_qk_norm=str(whole.get("model_type")).startswith("qwen3"),
        is_gated=whole.get("model_type") not in ("gpt2", "gpt_neox", "opt"),
        is_measured=whole.get("model_type") in FAMILIES,
    )


def complete(config: Config) -> dict[str, Any]:
    """`config` with the defaults of the installed config class under it."""
    model_type = str(config.get("model_type"))
    said = {key: value for key, value in config.items() if value is not None}
    kind = config_class(model_type)
    return {**(kind.defaults if kind else {}), "model_type": model_type, **said}


def _model(family: str, config: Config) -> _Named:
    hidden, vocabulary = config["hidden_size"], config["vocab_size"]
    yield "model.embed_tokens.weight", (vocabulary, hidden)
    for index in range(config["num_hidden_layers"]):
        for name, shape in _layer(family, config):
            yield f"model.layers.{index}.{name}", shape
    yield "model.norm.weight", (hidden,)
    if not config.get("tie_word_embeddings"):
        yield "lm_head.weight", (vocabulary, hidden)


def _layer(family: str, config: Config) -> _Named:
    hidden = config["hidden_size"]
    yield from _attention(family, config)
    yield from _experts(config) if family == "mixtral" else _gated_mlp(config)
    yield "input_layernorm.weight", (hidden,)
    yield "post_attention_layernorm.weight", (hidden,)


def _attention(family: str, config: Config) -> _Named:
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    head_dim = config.get("head_dim") or hidden // heads
    kv_heads = config.get("num_key_value_heads") or heads
    biases: Mapping[str, tuple[str, ...]] = {"qwen2": ("q_proj", "k_proj", "v_proj")}
    every = ("q_proj", "k_proj", "v_proj", "o_proj") if config.get("attention_bias") else ()
    widths = {"q_proj": heads, "k_proj": kv_heads, "v_proj": kv_heads}
    for name, count in widths.items():
        yield f"self_attn.{name}.weight", (count * head_dim, hidden)
        if name in biases.get(family, every):
            yield f"self_attn.{name}.bias", (count * head_dim,)
    yield "self_attn.o_proj.weight", (hidden, heads * head_dim)
    if "o_proj" in biases.get(family, every):
        yield "self_attn.o_proj.bias", (hidden,)
    if family.startswith("qwen3"):
        yield "self_attn.q_norm.weight", (head_dim,)
        yield "self_attn.k_norm.weight", (head_dim,)


def _gated_mlp(config: Config) -> _Named:
    hidden, width = config["hidden_size"], config["intermediate_size"]
    for name, shape in {
        "gate_proj": (width, hidden),
        "up_proj": (width, hidden),
        "down_proj": (hidden, width),
    }.items():
        yield f"mlp.{name}.weight", shape
        if config.get("mlp_bias"):
            yield f"mlp.{name}.bias", (shape[0],)


def _experts(config: Config) -> _Named:
    """All experts of a layer are one tensor for each matrix, as transformers 5 holds them."""
    hidden = config["hidden_size"]
    width, experts = config["intermediate_size"], config["num_local_experts"]
    yield "mlp.gate.weight", (experts, hidden)
    yield "mlp.experts.gate_up_proj", (experts, 2 * width, hidden)
    yield "mlp.experts.down_proj", (experts, hidden, width)
