"""The shapes of a run's model, from the cheapest place that knows them.

In this order: the headers of its weight files, where they hold what its config describes and
nothing else; a formula, where the family has one; else the model itself on the meta device, in a
process whose answer is kept. Files may hold more than the model has, or less: then they only have
to agree in the shapes of what both have. A model of the hub is looked for in the local cache; one
that is not there yet can't be measured before it is downloaded.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bigtrain.arguments.model_fields import read_config, too_deep
from bigtrain.checkpoint.json_object import counts
from bigtrain.errors import ConfigError
from bigtrain.memory.adapters import with_adapters
from bigtrain.memory.families import architecture, from_formula
from bigtrain.memory.known_models import KNOWN_MODELS
from bigtrain.memory.questions import Asker, RefusedModelError
from bigtrain.memory.shapes import BYTES, ModelShapes, Parameter
from bigtrain.memory.weight_files import from_weight_files
from bigtrain.paths import below
from bigtrain.small_files import read_small_text

_VARIABLE = re.compile(r"\$(?:(\w+)|\{([^}]*)\})", re.A)
_BYTE_TOKENS = 257
"""Tokens of `tokenizer: {kind: bytes}`."""
_MOST_OF_TOKENIZER = 256 << 20


@dataclass(frozen=True, kw_only=True)
class Model:
    """What was found of a run's model. `shapes` is None where nothing is known, and `why` says why.

    `question` is what a process needs to build it: its config, or its directory.
    """

    shapes: ModelShapes | None
    why: str = ""
    is_refused: bool = False
    """Whether transformers can't make it, so that no launch could."""
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
    source = _Source(dtype=_word(section.get("dtype")), asker=asker if asks else None)
    name = section.get("name")
    folder = (
        local_folder(str(name), section.get("revision"), working_dir, environment) if name else None
    )
    if not name:
        found = _from_scratch(section, tokenizer, working_dir, environment, source)
    elif folder is not None:
        found = _stored(
            folder,
            source,
            runs_code=bool(section.get("trust_remote_code")),
            needs_classes=bool(section.get("lora")),
        )
    elif name in KNOWN_MODELS:
        found = source.of_config(KNOWN_MODELS[name], dtype="bf16")
    else:
        why = f"{name} is not on this machine yet; download it, or give a local path"
        return Model(shapes=None, why=why, question={})
    if found.shapes is None:
        return found
    also = {key: section[key] for key in ("attn_implementation", "lora") if section.get(key)}
    shapes = with_adapters(found.shapes, section.get("lora"))
    return replace(found, shapes=shapes, question={**found.question, **also})


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
    hub = _hub_cache(working_dir, environment)
    repository = hub / f"models--{name.replace('/', '--')}"
    reference = repository / "refs" / (revision or "main")
    try:
        commit = reference.read_text(encoding="utf-8").strip()
    except OSError:
        commit = revision or ""
    snapshot = repository / "snapshots" / commit
    return snapshot if commit and snapshot.is_dir() else None


def _hub_cache(working_dir: Path, environment: Mapping[str, str]) -> Path:
    """Where huggingface_hub keeps repositories (its `constants.py`)."""

    def at(text: str) -> str:
        home = environment.get("HOME") or str(Path.home())
        own = f"{home}{text[1:]}" if text == "~" or text.startswith("~/") else text
        return _VARIABLE.sub(lambda found: environment.get(found[1] or found[2], found[0]), own)

    cache = environment.get("XDG_CACHE_HOME", at("~/.cache"))
    home = at(environment.get("HF_HOME", str(Path(cache, "huggingface"))))
    hub = environment.get("HUGGINGFACE_HUB_CACHE", str(Path(home, "hub")))
    return working_dir / at(environment.get("HF_HUB_CACHE", hub))


@dataclass(frozen=True, kw_only=True)
class _Source:
    """What knows a model's shapes by its config."""

    dtype: str | None
    """What the section says that weights are loaded as."""
    asker: Asker | None
    """None: what only a process of its own can tell is not asked."""

    def of_config(self, config: Mapping[str, Any], *, dtype: str) -> Model:
        """The model that `config` describes; `dtype` where the section says none."""
        question = {"config": dict(config), "dtype": self.dtype or dtype}
        return self.find(question, config, dtype=dtype)

    def find(self, question: Mapping[str, Any], config: Mapping[str, Any], *, dtype: str) -> Model:
        """By formula where the family has one, else from the model that `question` builds."""
        if why := too_deep(config):
            return Model(shapes=None, why=f"its config: {why}", question=question)
        shapes = from_formula(config, dtype=self.dtype or dtype)
        if shapes is not None:
            return Model(shapes=shapes, question=question)
        if self.asker is None:
            return Model(shapes=None, why="its family has no formula", question=question)
        try:
            return Model(shapes=_asked(self.asker, question, config), question=question)
        except ConfigError as error:
            is_refused = isinstance(error, RefusedModelError)
            return Model(shapes=None, why=str(error), is_refused=is_refused, question=question)


def _from_scratch(
    section: Mapping[str, Any],
    tokenizer: Mapping[str, Any],
    working_dir: Path,
    environment: Mapping[str, str],
    source: _Source,
) -> Model:
    """As the worker does: a vocabulary that is not said is as large as the tokenizer's."""
    config = dict(section["config"])
    if "vocab_size" not in config:
        size = _tokenizer_size(tokenizer, working_dir, environment)
        if size is None:
            return _of_default_vocabulary(source.of_config(config, dtype="fp32"))
        config["vocab_size"] = size
    return source.of_config(config, dtype="fp32")


def _of_default_vocabulary(found: Model) -> Model:
    if found.shapes is None:
        return found
    note = "with its default vocab_size: the tokenizer's size is not known here"
    return replace(found, shapes=replace(found.shapes, source=f"{found.shapes.source}, {note}"))


def _stored(folder: Path, source: _Source, *, runs_code: bool, needs_classes: bool) -> Model:
    """The model in a directory, as its config.json describes it and as the worker loads it.

    `needs_classes`: names and shapes alone don't do; it counts which modules they belong to.
    """
    config = read_config(folder)
    said = _word(config.get("dtype") or config.get("torch_dtype")) or "fp32"
    is_packed = bool(config.get("quantization_config"))
    dtype = None if is_packed else source.dtype or said
    stored = from_weight_files(folder, config, dtype=dtype)
    digest = hashlib.sha256(repr(config).encode()).hexdigest()
    question = {"name": str(folder), "dtype": source.dtype, "config_digest": digest}
    if is_packed or (runs_code and "auto_map" in config):
        why = "" if stored else "only its own code knows its shapes, and a plan does not run it"
        return Model(shapes=stored.shapes if stored else None, why=why, question=question)
    if stored is None:
        return source.find(question, config, dtype=said)
    if stored.is_exact and from_formula(config, dtype=said) is None and not needs_classes:
        return Model(shapes=stored.shapes, question=question)
    found = source.find(question, config, dtype=said)
    if found.shapes is None:
        return found if found.is_refused else Model(shapes=stored.shapes, question=question)
    _check_shapes(folder, stored.shapes, found.shapes)
    if stored.is_exact and len(stored.shapes.parameters) == len(found.shapes.parameters):
        shapes = replace(found.shapes, source=stored.shapes.source)  # which say the same
        found = replace(found, shapes=shapes)
    return found


def _check_shapes(folder: Path, stored: ModelShapes, shapes: ModelShapes) -> None:
    """ConfigError where a tensor has another shape than the model's, as `from_pretrained` does.

    Files of a base model leave out the prefix by which a model with a head holds it.
    """
    found = {parameter.name: parameter.shape for parameter in stored.parameters}
    for parameter in shapes.parameters:
        bare = parameter.name.partition(".")[2]
        shape = found.get(parameter.name, found.get(bare, parameter.shape))
        if shape != parameter.shape:
            raise ConfigError(
                f"model.name: {folder}: {parameter.name} is {_spelled(shape)} in its weight files, "
                f"but {_spelled(parameter.shape)} by its config.json; give the config.json that "
                "belongs to these weights"
            )


def _spelled(shape: tuple[int, ...]) -> str:
    return " × ".join(map(str, shape))


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
        name=name,
        shape=counts(entry["shape"]),
        dtype=dtype,
        trained=bool(entry["trained"]),
        is_transposed=bool(entry["transposed"]),
    )


def _tokenizer_size(
    tokenizer: Mapping[str, Any], working_dir: Path, environment: Mapping[str, str]
) -> int | None:
    if tokenizer.get("kind") == "bytes":
        return _BYTE_TOKENS
    name = tokenizer.get("name")
    folder = local_folder(str(name), None, working_dir, environment) if name else None
    if folder is None:
        return None
    try:
        file = folder / "tokenizer.json"
        content = json.loads(read_small_text(file, label="", limit=_MOST_OF_TOKENIZER))
        vocabulary, added = content["model"]["vocab"], content.get("added_tokens", ())
        # A Unigram model's pieces are a list, each with its score.
        own = [*vocabulary] if isinstance(vocabulary, dict) else [piece for piece, _ in vocabulary]
        return len({*own, *(token["content"] for token in added)})
    except (ConfigError, ValueError, RecursionError, LookupError, TypeError, AttributeError):
        return None


def _word(dtype: Any) -> str | None:
    """As `BYTES` knows it; None for what names no type of elements, as `auto`."""
    words = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
    word = words.get(str(dtype), str(dtype))
    return word if word in BYTES else None
