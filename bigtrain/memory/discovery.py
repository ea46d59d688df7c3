"""The shapes of a run's model, from the cheapest place that knows them.

In this order: the headers of its weight files; a formula, where the family has one; else the model
itself on the meta device, in a process whose answer is kept. A model of the hub is looked for in
the local cache; one that is not there yet can't be measured before it is downloaded.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bigtrain.arguments.model_fields import read_config
from bigtrain.checkpoint.json_object import counts
from bigtrain.errors import ConfigError
from bigtrain.memory.adapters import with_adapters
from bigtrain.memory.families import architecture, from_formula
from bigtrain.memory.known_models import KNOWN_MODELS
from bigtrain.memory.questions import Asker
from bigtrain.memory.shapes import BYTES, ModelShapes, Parameter
from bigtrain.memory.weight_files import from_weight_files
from bigtrain.paths import below

_BYTE_TOKENS = 257
"""Tokens of `tokenizer: {kind: bytes}`."""


@dataclass(frozen=True, kw_only=True)
class Model:
    """What was found of a run's model. `shapes` is None where nothing is known, and `why` says why.

    `question` is what a process needs to build it: its config, or its name and revision.
    """

    shapes: ModelShapes | None
    why: str = ""
    question: Mapping[str, Any]


def find_model(
    section: Mapping[str, Any],
    *,
    tokenizer: Mapping[str, Any],
    working_dir: Path,
    environment: Mapping[str, str],
    asks: bool = True,
) -> Model:
    """The model of a plan's `model` section. `asks`: by a process of its own where need be."""
    asker = Asker(cache=cache_folder(environment) / "shapes", environment=environment)
    if section.get("config"):
        config = _sized(dict(section["config"]), tokenizer, working_dir, environment)
        scratch = _word(section.get("dtype")) or "fp32"
        question: dict[str, Any] = {"config": config, "dtype": scratch}
        shapes = from_formula(config, dtype=scratch)
    else:
        name, dtype = str(section["name"]), _word(section.get("dtype"))
        folder = local_folder(name, section.get("revision"), working_dir, environment)
        if folder is not None:
            config = read_config(folder)
            question = {"name": str(folder), "dtype": dtype}
            shapes = _stored(folder, config, dtype)
        elif name in KNOWN_MODELS:
            config = dict(KNOWN_MODELS[name])
            question = {"config": config, "dtype": dtype or "bf16"}
            shapes = from_formula(config, dtype=dtype or "bf16")
        else:
            why = f"{name} is not on this machine yet; download it, or give a local path"
            return Model(shapes=None, why=why, question={})
    if shapes is None and not asks:
        return Model(shapes=None, why="its family has no formula", question=question)
    if shapes is None:
        try:
            shapes = _asked(asker, question, config)
        except ConfigError as error:
            return Model(shapes=None, why=str(error), question=question)
    for key in ("attn_implementation", "lora"):
        if section.get(key):
            question[key] = section[key]
    return Model(shapes=with_adapters(shapes, section.get("lora")), question=question)


def cache_folder(environment: Mapping[str, str]) -> Path:
    """Where bigtrain keeps what it can make again."""
    base = environment.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "bigtrain"


def local_folder(
    name: str, revision: str | None, working_dir: Path, environment: Mapping[str, str]
) -> Path | None:
    """A model's directory: the path itself, or the snapshot that the hub's cache holds."""
    path = below(working_dir, name, label="model.name")
    if path.is_dir():
        return path
    home = Path(environment.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
    hub = Path(environment.get("HF_HUB_CACHE") or home / "hub")
    repository = hub / f"models--{name.replace('/', '--')}"
    reference = repository / "refs" / (revision or "main")
    try:
        commit = reference.read_text(encoding="utf-8").strip()
    except OSError:
        commit = revision or ""
    snapshot = repository / "snapshots" / commit
    return snapshot if commit and snapshot.is_dir() else None


def _stored(folder: Path, config: Mapping[str, Any], dtype: str | None) -> ModelShapes | None:
    """From the headers; in the modules' own order where the formula knows the same tensors."""
    stored = from_weight_files(folder, config, dtype=dtype)
    said = _word(config.get("dtype") or config.get("torch_dtype"))
    formula = from_formula(config, dtype=dtype or said or "fp32")
    if stored is None or formula is None:
        return stored or formula
    found = {parameter.name: parameter for parameter in stored.parameters}
    same = {p.name: p.shape for p in formula.parameters} == {
        name: parameter.shape for name, parameter in found.items()
    }
    if not same:
        return stored
    return replace(stored, parameters=tuple(found[p.name] for p in formula.parameters))


def _asked(asker: Asker, question: Mapping[str, Any], config: Mapping[str, Any]) -> ModelShapes:
    def read(answer: Any) -> ModelShapes:
        return ModelShapes(
            parameters=tuple(map(read_parameter, answer["parameters"])),
            source="the model on the meta device",
            architecture=architecture({**answer["config"], **config}),
        )

    return asker.ask({"kind": "shapes", **question}, read=read)


def read_parameter(entry: Mapping[str, Any]) -> Parameter:
    """A parameter as `answers` tells it; ValueError, TypeError or LookupError for what is none."""
    name, dtype = str(entry["name"]), str(entry["dtype"])
    if dtype not in BYTES:
        raise ValueError(f"{dtype} is no type of elements")
    return Parameter(
        name=name, shape=counts(entry["shape"]), dtype=dtype, trained=bool(entry["trained"])
    )


def _sized(
    config: dict[str, Any],
    tokenizer: Mapping[str, Any],
    working_dir: Path,
    environment: Mapping[str, str],
) -> dict[str, Any]:
    """As the worker does: a vocabulary that is not said is as large as the tokenizer's."""
    if "vocab_size" not in config:
        size = _tokenizer_size(tokenizer, working_dir, environment)
        if size is not None:
            config["vocab_size"] = size
    return config


def _tokenizer_size(
    tokenizer: Mapping[str, Any], working_dir: Path, environment: Mapping[str, str]
) -> int | None:
    if tokenizer.get("kind") == "bytes":
        return _BYTE_TOKENS
    name = tokenizer.get("name")
    folder = local_folder(str(name), None, working_dir, environment) if name else None
    try:
        content = json.loads((folder / "tokenizer.json").read_text("utf-8")) if folder else {}
        vocabulary, added = content["model"]["vocab"], content.get("added_tokens", ())
        return len({*vocabulary, *(token["content"] for token in added)})
    except (OSError, ValueError, RecursionError, KeyError, TypeError):
        return None


def _word(dtype: Any) -> str | None:
    """As `BYTES` knows it; None for what names no type of elements, as `auto`."""
    words = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
    word = words.get(str(dtype), str(dtype))
    return word if word in BYTES else None
