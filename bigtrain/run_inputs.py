"""What a run file names on this machine and is not there: files, columns, models, packages.

Only looks that cost nothing: a directory's entries, the first lines of a file.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from bigtrain.arguments import installed
from bigtrain.arguments.model_fields import read_config, stored_faults, too_long
from bigtrain.arguments.reporters import reporters
from bigtrain.arguments.values import did_you_mean
from bigtrain.data.files import columns, format_of, matching
from bigtrain.data.sources import BUILTINS
from bigtrain.errors import ConfigError, DataError
from bigtrain.paths import below
from bigtrain.sections import DataSection, ModelSection, TokenizerSection

_PATH_STARTS = ("/", "./", "../", "~")
# As huggingface_hub's `validate_repo_id` has it.
_REPOSITORY = re.compile(r"(?!.*(?:--|\.\.))(?:\b[\w.-]{1,96}\b/)?\b[\w.-]{1,96}\b(?<!\.git)", re.A)
_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
_ELSEWHERE = "adapter_config.json"
"""Beside it the weights may be those of the base model that it names."""


def faults(
    data: DataSection | None,
    model: ModelSection | None,
    tokenizer: TokenizerSection | None,
    *,
    root: Path,
) -> Iterator[tuple[str, str]]:
    """(`section.key`, what is wrong and the fix). Relative paths are looked for under `root`.

    A section that is None is passed over; without a tokenizer's, the model brings its own.
    """
    if model is not None and model.name is not None:
        needed = ("config.json",) if tokenizer else ("config.json", "tokenizer_config.json")
        yield from directory_faults("model.name", model.name, needed, root)
        yield from _config_faults(model, data, below(root, model.name, label="model.name"))
    if tokenizer is not None and tokenizer.name is not None:
        needed = ("tokenizer_config.json",)
        yield from directory_faults("tokenizer.name", tokenizer.name, needed, root)
    if data is not None:
        yield from _data_faults(data, root)


# Reporter → the packages of which it needs one, where that isn't one of its own name.
_REPORTERS: Mapping[str, tuple[str, ...]] = {
    "azure_ml": ("azureml",),
    "flyte": ("flytekit",),
    "tensorboard": ("tensorboard", "tensorboardX"),
}
_NEED_NONE = ("all", "none", "kubeflow")


def package_faults(training: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(`training.key`, what is wrong and the fix) for packages that arguments need."""
    optimizer = str(training.get("optim"))
    package = installed.optimizer_packages().get(optimizer)
    if package is not None:
        yield from _package_faults("optim", optimizer, (package,))
    said = training.get("report_to") or []
    for name in [said] if isinstance(said, str) else said:
        if name in reporters() and name not in _NEED_NONE:
            yield from _package_faults("report_to", name, _REPORTERS.get(name, (name,)))
    if training.get("use_liger_kernel"):
        yield from _package_faults("use_liger_kernel", "it", ("liger_kernel",))


def _package_faults(
    argument: str, what: str, packages: tuple[str, ...]
) -> Iterator[tuple[str, str]]:
    if not any(importlib.util.find_spec(package) for package in packages):
        yield f"training.{argument}", f"{what} needs {packages[0]}, which is not installed"


def directory_faults(
    key: str, name: str, needed: tuple[str, ...], root: Path
) -> Iterator[tuple[str, str]]:
    """A name that can only be a path, or that is one here, has to hold what is loaded from it."""
    path = below(root, name, label=key)
    if path.is_file():
        yield key, f"{name} is a file; give the directory that holds it"
    elif not path.is_dir():
        if name.startswith(_PATH_STARTS):
            yield key, f"{name} is not a directory{_nearest(path)}"
        elif not _REPOSITORY.fullmatch(name):
            what = "is neither a directory here nor a repository of the hub, as in owner/name"
            yield key, f"{name} {what}{_nearest(path)}"
    elif lacking := [file for file in needed if not (path / file).is_file()]:
        yield key, f"{name} has no {' and no '.join(lacking)}; it holds {_entries(path)}"


def _entries(folder: Path) -> str:
    return ", ".join(sorted(entry.name for entry in folder.iterdir())[:8]) or "nothing"


def _config_faults(
    model: ModelSection, data: DataSection | None, folder: Path
) -> Iterator[tuple[str, str]]:
    """Of a model that lies here; that its config is missing is told already."""
    if not (folder / "config.json").is_file():
        return
    config = read_config(folder)
    if "transformers_weights" not in config and not _has_weights(folder):
        wanted = f"no weights ({' or '.join(_WEIGHTS)}, whole or by an index)"
        yield "model.name", f"{model.name} has {wanted}; it holds {_entries(folder)}"
    found = list(stored_faults(config, runs_code=model.trust_remote_code))
    yield from (("model.name", f"{model.name}: {why}") for why in found)
    if data is None or found:
        return
    is_default = "sequence_length" not in data.model_fields_set
    if why := too_long(config, data.sequence_length, is_default=is_default):
        yield "data.sequence_length", why


def _has_weights(folder: Path) -> bool:
    names = (*_WEIGHTS, *(f"{name}.index.json" for name in _WEIGHTS), _ELSEWHERE)
    return any((folder / name).is_file() for name in names)


def _nearest(path: Path) -> str:
    folder = path.parent
    names = [entry.name for entry in folder.iterdir()] if folder.is_dir() else []
    return did_you_mean(path.name, names)


def _data_faults(data: DataSection, root: Path) -> Iterator[tuple[str, str]]:
    name = data.name or ""
    if name.startswith("builtin:") and name not in BUILTINS:
        yield "data.name", f"{name!r} is not one of {', '.join(BUILTINS)}"
    for key, patterns in (("train_files", data.train_files), ("eval_files", data.eval_files)):
        for pattern in patterns or ():
            yield from _file_faults(f"data.{key}", pattern, data, root)


def _file_faults(
    key: str, pattern: str, data: DataSection, root: Path
) -> Iterator[tuple[str, str]]:
    """One look at the first file of a pattern: the others are likely to be like it."""
    try:
        files = matching(pattern, root)
        kinds = [data.format or format_of(path) for path in files]
    except (ConfigError, DataError) as error:
        yield key, str(error)
        return
    found = columns(files[0], kinds[0])
    if found is not None and data.text_field not in found:
        yield (
            "data.text_field",
            f"{files[0]} has no column {data.text_field!r}; it has {', '.join(found)}",
        )
