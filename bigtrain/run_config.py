"""The user's words, validated: a run file with `--set` and flags on top.

Every value keeps where it was said, and all faults are told at once.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from bigtrain import run_inputs, section_faults
from bigtrain.arguments.schema import Field, load_schema
from bigtrain.arguments.values import TOO_LARGE, TOO_LARGE_ADVICE, did_you_mean, read_value
from bigtrain.errors import ConfigError
from bigtrain.layers import Layers, Override, lay, plain_values
from bigtrain.run_file import read_run_file
from bigtrain.secrecy import SECRET_ADVICE, holds_secret, is_secret
from bigtrain.sections import (
    ClusterSection,
    DataSection,
    EngineSection,
    ModelSection,
    Section,
    TokenizerSection,
    read_name,
)
from bigtrain.slurm.settings import read_settings

_SECTIONS: Mapping[str, type[Section]] = {
    "model": ModelSection,
    "tokenizer": TokenizerSection,
    "data": DataSection,
    "engine": EngineSection,
    "cluster": ClusterSection,
}
_REQUIRED = ("model", "data")
_TOP_LEVEL: Mapping[str, type[Any]] = {"name": str, "output_dir": str, "global_batch_size": int}
_TOLD_OF_SCRIPTS = frozenset(
    {
        "bf16",
        "fp16",
        "use_cpu",
        "deepspeed",
        "fsdp",
        "fsdp_config",
        "gradient_accumulation_steps",
        "gradient_checkpointing",
        "max_grad_norm",
    }
)
_LOOKED_AT_ELSEWHERE = (("training", "hub_token"), ("cluster", "slurm"))
"""What else than a plain value may stand there: it is judged by its own rules."""
_KNOWN = (*_TOP_LEVEL, *_SECTIONS, "training")
_S = TypeVar("_S", bound=Section)


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A whole run as a human described it. Nothing is derived yet but defaults."""

    name: str
    output_dir: str
    global_batch_size: int | None
    model: ModelSection
    tokenizer: TokenizerSection | None
    """None: the model's own."""
    data: DataSection
    training: Mapping[str, Any]
    """TrainingArguments fields that were said, each of its field's type."""
    engine: EngineSection
    cluster: ClusterSection
    origins: Mapping[str, str]
    """Dotted key → where it was said. What was left to its default is not in it."""


@dataclass(frozen=True, kw_only=True)
class Reading:
    """A run file as far as it can be read."""

    config: RunConfig | None
    """Without the arguments and the data's keys that are wrong; None where something is wrong on
    which the whole plan depends."""
    faults: tuple[str, ...]
    wrong: frozenset[str]
    """The names of the keys that the faults are of."""

    def follows(self, fault: str) -> bool:
        """Whether a fault of the plan may only be there because a key is wrong that it names."""
        return any(re.search(rf"\b{re.escape(key)}\b", fault) for key in self.wrong)


@dataclass(frozen=True, kw_only=True)
class ScriptConfig:
    """What can be said of a run whose script makes its own model, data and arguments."""

    name: str | None
    output_dir: str | None
    """Where the plan and the logs go; the script's own output goes where the script says."""
    engine: EngineSection
    cluster: ClusterSection
    training: Mapping[str, Any]
    """What another tool's engine config says: precision, clipping, recomputation, the config."""
    origins: Mapping[str, str]


def load_run_config(
    path: Path, *, label: str | None = None, overrides: Sequence[Override] = ()
) -> RunConfig:
    """The run that the file at `path` describes, as `read_run_config`.

    Raises ConfigError with every fault, each as `file:line: section.key: what; the fix`.
    """
    reading = read_run_config(path, label=label, overrides=overrides)
    if reading.config is None or reading.faults:
        raise ConfigError(reading.faults)
    return reading.config


def read_run_config(
    path: Path,
    *,
    label: str | None = None,
    overrides: Sequence[Override] = (),
    foreign: Sequence[Override] = (),
    root: Path | None = None,
) -> Reading:
    """The run that the file at `path` describes, with `overrides` on top, and its faults.

    `foreign` is what another tool's config says; it may not contradict the file. Where there will
    be no plan, what is missing under `root` is told as well. `label` is the file's name in
    messages and origins, by default its path.
    """
    label = label or str(path)
    layers = lay(read_run_file(path, label=label), overrides, label=label, foreign=foreign)
    _refuse_untold(layers)
    _refuse_unknown(layers)
    top = _top_level(layers)
    training = _training(layers, top)
    model = _section(layers, "model", ModelSection)
    tokenizer = _section(layers, "tokenizer", TokenizerSection)
    data = _section(layers, "data", DataSection)
    engine = _section(layers, "engine", EngineSection)
    cluster = _cluster(layers)
    has_tokenizer = layers.values.get("tokenizer") is not None
    if model is not None and model.config is not None and not has_tokenizer:
        what = "missing; a model from scratch brings none; give tokenizer.name, or kind: bytes"
        layers.fault(("tokenizer",), what)
    section_faults.refuse_impossible(layers, training, data)
    section_faults.check_attention(layers, model)
    is_sound = section_faults.check_config(layers, model, data)
    is_plannable = is_sound and not layers.wrong & {"tokenizer", *_TOP_LEVEL, *_KNOWN}
    if model is None or data is None or engine is None or cluster is None or not is_plannable:
        if root is not None:
            missing = run_inputs.faults(data, model, tokenizer, root=root)
            for key, what in (*missing, *run_inputs.package_faults(training)):
                layers.fault(tuple(key.split(".")), what)
        return Reading(config=None, faults=tuple(layers.told()), wrong=frozenset(layers.wrong))
    name = top.get("name") or path.stem
    config = RunConfig(
        name=name,
        output_dir=top.get("output_dir") or f"runs/{name}",
        global_batch_size=top.get("global_batch_size"),
        model=model,
        tokenizer=tokenizer,
        data=data,
        training=training,
        engine=engine,
        cluster=cluster,
        origins=layers.origins,
    )
    return Reading(config=config, faults=tuple(layers.told()), wrong=frozenset(layers.wrong))


def load_script_config(
    overrides: Sequence[Override], *, foreign: Sequence[Override] = ()
) -> ScriptConfig:
    """The engine and cluster that flags and `--set` ask for, for a user's own script.

    Of `training`, a script takes only what chooses and fills the engine; the rest it sets itself.
    """
    layers = lay(None, overrides, label="the command line", foreign=foreign)
    _refuse_untold(layers)
    for key in layers.values:
        if key not in ("engine", "cluster", "name", "output_dir", "training"):
            layers.fault((key,), "a script sets this itself: give it to the script, after --")
    training = _training(layers, {})
    for key in training:
        if key not in _TOLD_OF_SCRIPTS:
            path = ("training", key)
            layers.fault(path, "a script sets this itself: give it to the script, after --")
    top = _top_level(layers)
    engine = _section(layers, "engine", EngineSection)
    cluster = _cluster(layers)
    layers.raise_faults()
    assert engine is not None and cluster is not None
    return ScriptConfig(
        name=top.get("name"),
        output_dir=top.get("output_dir"),
        engine=engine,
        cluster=cluster,
        training=training,
        origins=layers.origins,
    )


def _refuse_untold(layers: Layers) -> None:
    """Refuse what no message may repeat, secrets and endless numbers, and take it out."""
    for path, value in list(plain_values(layers.values)):
        is_number = isinstance(value, int) and abs(value) >= TOO_LARGE
        if path[:2] in _LOOKED_AT_ELSEWHERE or not (is_number or is_secret(path[-1], value)):
            continue
        layers.fault(path, TOO_LARGE_ADVICE if is_number else SECRET_ADVICE)
        layers.take_out(path[: 3 if path[:2] == ("cluster", "env") else 2])


def _refuse_unknown(layers: Layers) -> None:
    for key in layers.values:
        if key not in _KNOWN:
            home = _home(key)
            hint = f"; it belongs under {home}:" if home else did_you_mean(key, _KNOWN)
            layers.fault((key,), f"unknown key{hint}")


def _home(key: str) -> str | None:
    """The section that has a key of this name, for one that was written at the wrong place."""
    if key in load_schema():
        return "training"
    homes = (name for name, kind in _SECTIONS.items() if key in kind.model_fields)
    return next(homes, None)


def _top_level(layers: Layers) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, kind in _TOP_LEVEL.items():
        value = layers.values.get(key)
        if value is None:
            continue
        if not isinstance(value, kind) or isinstance(value, bool):
            wanted = "a whole number" if kind is int else "text"
            layers.fault((key,), f"{value!r} is not {wanted}")
        elif kind is int and value < 1:
            layers.fault((key,), f"{value} is too small; it must be at least 1")
        else:
            try:
                found[key] = read_name(value)
            except ValueError as error:
                layers.fault((key,), str(error))
            if key == "name" and ("\\" in value or {"", ".", ".."} & {*value.split("/")}):
                what = "is no run's name, which a directory below runs/ has too; use a word"
                layers.fault((key,), f"{value!r:.80} {what}")
    return found


def _mapping(layers: Layers, name: str) -> Mapping[str, Any] | None:
    """A section's keys; None where it is missing though needed, or no mapping."""
    value = layers.values.get(name)
    if value is None:
        if name in _REQUIRED:
            layers.fault((), f"the section {name} is missing")
            return None
        return {}
    if not isinstance(value, Mapping):
        layers.fault((name,), f"{value!r} is not a section; write its keys below it, indented")
        return None
    return value


def _section(layers: Layers, name: str, kind: type[_S]) -> _S | None:
    """The section validated, or None after its faults were noted.

    Of the data's, no engine and no memory depends on a key that is wrong: it is left out.
    """
    value = _mapping(layers, name)
    if value is None or (name == "tokenizer" and layers.values.get(name) is None):
        return None
    try:
        return kind.model_validate(dict(value))
    except ValidationError as error:
        for details in error.errors(include_url=False):
            path = (name, *(str(part) for part in details["loc"]))
            layers.fault(path, _explained(details, kind))
        wrong = {str(details["loc"][0]) for details in error.errors() if details["loc"]}
        if name != "data" or not wrong:
            return None
    try:
        return kind.model_validate({key: value[key] for key in value.keys() - wrong})
    except ValidationError:
        return None


def _explained(details: ErrorDetails, kind: type[Section]) -> str:
    """A pydantic error in the words of a run file."""
    value, context = details["input"], details.get("ctx", {})
    what = details["type"]
    if what == "extra_forbidden":
        key = str(details["loc"][-1])
        home = _home(key)
        hint = did_you_mean(key, kind.model_fields)
        return f"unknown key{hint or (f'; it belongs under {home}:' if home else '')}"
    if what == "literal_error":
        choices = re.findall(r"'([^']*)'", context["expected"])
        return f"{value!r} is not one of {', '.join(choices)}{did_you_mean(str(value), choices)}"
    if what == "value_error":
        return str(context["error"])
    wanted = {
        "int_type": "a whole number",
        "float_type": "a number",
        "bool_type": "true or false",
        "string_type": "text",
        "list_type": "a list",
        "dict_type": "a mapping",
    }.get(what)
    if wanted is not None:
        return f"{str(value).lower() if isinstance(value, bool) else repr(value)} is not {wanted}"
    if what == "greater_than_equal":
        return f"{value} is too small; it must be at least {context['ge']}"
    return details["msg"]


def _training(layers: Layers, top: dict[str, Any]) -> dict[str, Any]:
    """TrainingArguments fields, read by the installed schema. `output_dir` moves to the top."""
    schema = load_schema()
    found: dict[str, Any] = {}
    for key, value in (_mapping(layers, "training") or {}).items():
        path = ("training", key)
        if key not in schema:
            home = _home(key)
            hint = did_you_mean(key, schema) or (f"; it belongs under {home}:" if home else "")
            layers.fault(path, f"unknown key{hint}")
            continue
        try:
            found[key] = _read_argument(schema[key], value)
        except ValueError as error:
            layers.fault(path, str(error))
    if "hub_token" in found:
        layers.fault(("training", "hub_token"), f"{SECRET_ADVICE} (as HF_TOKEN)")
    output_dir = found.pop("output_dir", None)
    if output_dir is not None and top.setdefault("output_dir", output_dir) != output_dir:
        layers.fault(
            ("training", "output_dir"),
            f"{output_dir!r} and output_dir at the top, {top['output_dir']!r}, differ; keep one",
        )
    return found


# Declared as text, but taken otherwise as well: the newest checkpoint or none; sharding by default
# or not at all, and the older list of words.
_ALSO_TAKEN: Mapping[str, tuple[type, ...]] = {
    "resume_from_checkpoint": (bool,),
    "fsdp": (bool, list),
}


def _read_argument(field: Field, value: Any) -> Any:
    if isinstance(value, _ALSO_TAKEN.get(field.name, ())):
        return value
    return read_value(field, value)


def _cluster(layers: Layers) -> ClusterSection | None:
    section = layers.values.get("cluster")
    variables = section.get("env") if isinstance(section, Mapping) else None
    for name, value in (variables if isinstance(variables, Mapping) else {}).items():
        path = ("cluster", "env", name)
        if holds_secret(name, value):
            layers.fault(path, SECRET_ADVICE)
        elif isinstance(value, (list, dict)) or value is None:
            layers.fault(path, f"{value!r} is not text")
        elif not name or "=" in name or "\0" in f"{name}{value}":
            layers.fault(path, "not a name and value that an environment can hold")
    slurm = section.get("slurm") if isinstance(section, Mapping) else None
    if isinstance(slurm, Mapping):
        origins = {key: layers.origin(("cluster", "slurm", key)) for key in slurm}
        try:
            read_settings(slurm, origins=origins)
        except ConfigError as error:
            layers.faults(error.faults)
    return _section(layers, "cluster", ClusterSection)
