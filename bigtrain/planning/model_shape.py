"""What is known of a model before it is loaded: from `model.config` or a local config.json."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bigtrain.arguments.model_fields import read_config
from bigtrain.paths import below
from bigtrain.sections import ModelSection

_HIDDEN_SIZES = ("hidden_size", "n_embd", "d_model", "dim")


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """None: it can't be known yet, as for a model that is still on the hub."""

    model_type: str | None = None
    hidden_size: int | None = None


def read_shape(section: ModelSection, working_dir: Path) -> ModelShape:
    """The shape of the model that the section names."""
    config = section.config
    if config is None and section.name is not None:
        config = read_config(below(working_dir, section.name, label="model.name"))
    return _shape(config or {})


def _shape(config: Mapping[str, Any]) -> ModelShape:
    text = config.get("text_config")
    inner = text if isinstance(text, Mapping) else {}
    sizes = (source.get(key) for source in (config, inner) for key in _HIDDEN_SIZES)
    model_type = config.get("model_type")
    return ModelShape(
        model_type=model_type if isinstance(model_type, str) else None,
        hidden_size=next((size for size in sizes if isinstance(size, int) and size > 0), None),
    )
