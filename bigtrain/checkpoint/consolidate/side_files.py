"""Configuration and tokenizer: what lies beside the weights, and `from_pretrained` reads too."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from bigtrain.checkpoint.dtypes import DTYPES
from bigtrain.checkpoint.json_object import json_object
from bigtrain.errors import CheckpointError

CONFIG = "config.json"
_KNOWN = re.compile(
    r"^(config|generation_config|adapter_config|tokenizer|tokenizer_config|special_tokens_map"
    r"|added_tokens|chat_template|preprocessor_config|processor_config|normalizer|tekken"
    r"|video_preprocessor_config|feature_extractor_config|audio_tokenizer_config"
    r"|vocab|vocab-src|vocab-tgt|target_vocab|entity_vocab|emoji|byte_maps"
    r"|word_shape|word_pronunciation)\.json$"
    r"|^(vocab|merges|dict)\.txt$|^bpe\.codes$|^(source|target)\.spm$|^prophetnet\.tokenizer$"
    r"|^(tokenizer|spiece|spm|spm_char|sentencepiece.*)\.model$"
    r"|^.*\.tiktoken$|^chat_template\.jinja$"
    r"|^(modeling|configuration|tokenization|processing|image_processing)_\w+\.py$"
)
_MODULE = re.compile(r"^(?!zero_to_fp32\.)\w+\.py$")
"""What a model's own code may import; DeepSpeed's script is not of the model."""
_NESTED = re.compile(r"^(global_step\d+|pytorch_model.*|weights|checkpoint|step-\d+|fsdp_model)$")
_DTYPE_KEYS = ("dtype", "torch_dtype")


def find_side_files(step: Path) -> dict[str, Path]:
    """The files by name, from the step's directory and, where that is inside one, from above."""
    found: dict[str, Path] = {}
    for directory in _where(step):
        for path in sorted(directory.iterdir()):
            if is_side_file(path) and path.is_file():
                found.setdefault(path.name, path)
        templates = directory / "additional_chat_templates"
        if templates.is_dir():
            for path in sorted(templates.iterdir()):
                if path.is_file():
                    found.setdefault(f"{templates.name}/{path.name}", path)
    return found


def is_side_file(path: Path) -> bool:
    """Whether it is one of those that go along with a model: of other code, what lies beside the
    model's configuration."""
    if _MODULE.match(path.name) and (path.parent / CONFIG).is_file():
        return True
    return _KNOWN.match(path.name) is not None


def read_config(files: dict[str, Path]) -> dict[str, Any]:
    """The model's configuration; empty when there is none."""
    if CONFIG not in files:
        return {}
    try:
        return json_object(files[CONFIG].read_bytes())
    except ValueError as fault:
        raise CheckpointError(f"{files[CONFIG]}: not JSON ({fault}); it is damaged") from fault


def ties_embeddings(config: dict[str, Any]) -> bool:
    """Whether the model shares its input and output embeddings, as its configuration says."""
    inner = [value for value in config.values() if isinstance(value, dict)]
    return any(each.get("tie_word_embeddings") is True for each in [config, *inner])


def with_dtype(config: dict[str, Any], dtype: str) -> dict[str, Any]:
    """The configuration with the precision in which its weights are now, where it names one.

    transformers loads in the configuration's precision unless told otherwise.
    """
    return {
        key: dtype
        if key in _DTYPE_KEYS and isinstance(value, str) and value in DTYPES
        else with_dtype(value, dtype)
        if isinstance(value, dict) and key.endswith("_config")
        else value
        for key, value in config.items()
    }


def _where(step: Path) -> Iterator[Path]:
    yield step
    for parent in _parents(step):
        if parent.is_dir():
            yield parent


def _parents(step: Path) -> Sequence[Path]:
    resolved = step.resolve()
    return [resolved.parent] if _NESTED.match(resolved.name) else []
