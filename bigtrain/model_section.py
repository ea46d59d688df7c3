"""The `model` and `tokenizer` sections of a plan → a tokenizer and a way to make the model.

Nothing is built until the engine asks: a sharded engine lets rank 0 make the model and all others
its skeleton, so that no other rank ever holds it whole.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from bigtrain.arguments.model_fields import config_faults
from bigtrain.data.byte_tokenizer import make_byte_tokenizer
from bigtrain.errors import ConfigError
from bigtrain.paths import below
from bigtrain.run_inputs import directory_faults

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class ModelFactory:
    """Makes the run's model. Calling it gives the whole model, the same on every rank."""

    config: PretrainedConfig
    dtype: torch.dtype
    pretrained: str | None
    """Hub id or path of the weights; None: initialised from `seed`."""
    revision: str | None
    trust_remote_code: bool
    attn_implementation: str | None
    seed: int
    lora: Mapping[str, Any] | None = None
    """Low-rank adapters to train in place of the model's own weights."""

    def __call__(self) -> PreTrainedModel:
        # The global generator is left as it was, so that the trainer's own seeding counts.
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            model = self._load(self.pretrained) if self.pretrained else self._from_config()
            return add_adapters(model, self.lora) if self.lora else model

    def skeleton(self) -> PreTrainedModel:
        """The same modules on the meta device: names, shapes and dtypes, but no storage."""
        with torch.device("meta"):
            model = self._from_config()
            return add_adapters(model, self.lora) if self.lora else model

    def _load(self, place: str) -> PreTrainedModel:
        try:
            return AutoModelForCausalLM.from_pretrained(
                place,
                config=self.config,
                dtype=self.dtype,
                revision=self.revision or "main",
                trust_remote_code=self.trust_remote_code,
                **self._options(),
            )
        except (OSError, ValueError) as error:
            raise ConfigError(_unreachable("model.name", place, error)) from error

    def _from_config(self) -> PreTrainedModel:
        # A copy, because making a model writes its choices into the config.
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            copy.deepcopy(self.config),
            dtype=self.dtype,
            trust_remote_code=self.trust_remote_code,
            **self._options(),
        )
        return model

    def _options(self) -> dict[str, str]:
        if self.attn_implementation is None:
            return {}
        return {"attn_implementation": self.attn_implementation}


def add_adapters(model: Any, lora: Mapping[str, Any]) -> Any:
    """The model with peft's LoRA around it: itself frozen, its adapters trained."""
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ConfigError("model.lora needs peft; pip install peft") from error
    config = LoraConfig(
        r=lora["rank"],
        lora_alpha=lora["alpha"],
        lora_dropout=lora["dropout"],
        target_modules=list(lora["target_modules"]),
        task_type="CAUSAL_LM",
    )
    try:
        return get_peft_model(model, config)
    except ValueError as error:
        raise ConfigError(f"model.lora: {gist(error)}") from error


def load_tokenizer(
    section: Mapping[str, Any], *, model: Mapping[str, Any], root: Path
) -> PreTrainedTokenizerBase:
    """The tokenizer that the section names, else the model's own."""
    if section.get("kind") == "bytes":
        return make_byte_tokenizer()
    key = "tokenizer.name" if section.get("name") else "model.name"
    name = section.get("name") or model.get("name")
    if not name:
        raise ConfigError(
            "tokenizer is missing, and a model made from model.config brings none; give "
            "tokenizer.name, or tokenizer.kind: bytes"
        )
    place = _place(name, root)
    _require_directory(key, place, "tokenizer_config.json", root)
    # What was said of the model's repository is not said of another one.
    is_models = name == model.get("name")
    try:
        return AutoTokenizer.from_pretrained(
            place,
            revision=section.get("revision") or (is_models and model.get("revision")) or "main",
            trust_remote_code=is_models and bool(model.get("trust_remote_code")),
        )
    except (OSError, ValueError) as error:
        raise ConfigError(_unreachable(key, place, error)) from error


def model_factory(
    section: Mapping[str, Any],
    *,
    tokenizer: PreTrainedTokenizerBase,
    sequence_length: int,
    seed: int,
    root: Path,
) -> ModelFactory:
    """How to make the model of a plan's `model` section. Reads a config, and no weights."""
    name = section.get("name")
    place = _place(name, root) if name else None
    config = _read_config(section, place, root) if place else _new_config(section, tokenizer)
    _check_fit(config, tokenizer, sequence_length)
    return ModelFactory(
        config=config,
        dtype=_dtype(section, config),
        pretrained=place,
        revision=section.get("revision"),
        trust_remote_code=bool(section.get("trust_remote_code")),
        attn_implementation=section.get("attn_implementation"),
        seed=seed,
        lora=section.get("lora"),
    )


def _place(name: str, root: Path) -> str:
    """A local directory's path where there is one of that name, else the name as a hub id."""
    local = below(root, name, label="model")
    if local.is_dir() or name.startswith(("/", "./", "../", "~")):
        return str(local)
    return name


def _require_directory(key: str, place: str, needed: str, root: Path) -> None:
    """A plan may have been made elsewhere, or a while ago."""
    faults = [f"{at}: {why}" for at, why in directory_faults(key, place, (needed,), root)]
    if faults:
        raise ConfigError(faults)


def _read_config(section: Mapping[str, Any], place: str, root: Path) -> PretrainedConfig:
    _require_directory("model.name", place, "config.json", root)
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(
            place,
            revision=section.get("revision") or "main",
            trust_remote_code=bool(section.get("trust_remote_code")),
        )
        return config
    except (OSError, ValueError) as error:
        raise ConfigError(_unreachable("model.name", place, error)) from error


def _new_config(section: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> PretrainedConfig:
    """A config from `model.config`, with what it leaves open taken from the tokenizer."""
    fields = dict(section.get("config") or {})
    faults = [f"model.config.{key}: {why}" for key, why in config_faults(fields)]
    if faults:
        raise ConfigError(faults)
    kind = CONFIG_MAPPING[fields.pop("model_type")]
    known = set(kind.__dataclass_fields__) | set(kind.attribute_map)
    defaults = {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    given = {field: value for field, value in defaults.items() if field in known} | fields
    try:
        config: PretrainedConfig = kind(**given)
        return config
    except (StrictDataclassError, ValueError, TypeError) as error:
        raise ConfigError(f"model.config: {gist(error)}") from error


def _check_fit(
    config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase, sequence_length: int
) -> None:
    text_config = config.get_text_config()
    faults = []
    vocabulary = getattr(text_config, "vocab_size", None)
    if vocabulary is not None and vocabulary < len(tokenizer):
        faults.append(
            f"the model's vocab_size is {vocabulary}, but its tokenizer has {len(tokenizer)} "
            "tokens; raise model.config.vocab_size, or choose the model's own tokenizer"
        )
    positions = getattr(text_config, "max_position_embeddings", None)
    if positions is not None and positions < sequence_length:
        faults.append(
            f"data.sequence_length is {sequence_length}, but the model has {positions} positions "
            "(max_position_embeddings); make one fit the other"
        )
    if faults:
        raise ConfigError(faults)


def _dtype(section: Mapping[str, Any], config: PretrainedConfig) -> torch.dtype:
    """What the section says, else what the weights are stored in, else fp32."""
    said = section.get("dtype")
    if said in (None, "auto"):
        stored = config.dtype
        return stored if isinstance(stored, torch.dtype) else torch.float32
    dtype = _DTYPES.get(said) or getattr(torch, str(said), None)
    if not isinstance(dtype, torch.dtype):
        raise ConfigError(f"model.dtype is {said!r}; use {', '.join(_DTYPES)}")
    return dtype


def _unreachable(key: str, place: str, error: Exception) -> str:
    return (
        f"{key}: {place} can't be loaded: {gist(error)} "
        "(give a local directory, or make the hub reachable; HF_HUB_OFFLINE=1 uses what is cached)"
    )


def gist(error: Exception) -> str:
    """The part of a library's error that says what is wrong."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    return lines[-1] if isinstance(error, StrictDataclassError) else lines[0]
