"""What the keys of a DCP directory stand for: weights of which set, states of which parameter.

torch joins nested names by dots, and keeps in `.metadata`, as `planner_data`, the path by which it
came to each key: `model.a.weight` was ("model", "a.weight") in `{"model": state_dict}`, and
("model.a.weight",) in a bare state dict of a model that has a module `model`. Only where there are
no paths is that told by the names themselves.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

MODEL = "model"
"""The set of weights that is meant when none is named."""
TOP_LEVEL = "top-level"
"""The set of what lies beside dicts that may be the model as well."""

_MODELS = frozenset({MODEL, "model_state_dict", "model_state", "module", "state_dict"})
_AVERAGES = frozenset({"ema", "ema_model", "model_ema", "ema_state_dict", "ema_model_state_dict"})
_SETS = _MODELS | _AVERAGES
_STATE = re.compile(
    r"opt|(?:\w+_)?optim\w*|(?:lr_)?schedulers?(?:_state\w*)?|dataloader|train(?:er)?_state"
    r"|rng(?:_states?)?|random_states?|(?:grad_|loss_)?scaler(?:_state\w*)?"
)
"""Names of dicts that are no weights."""
_GUESSED_STATE = frozenset(
    {
        "optim",
        "optimizer",
        "optimizers",
        "lr_scheduler",
        "scheduler",
        "dataloader",
        "train_state",
    }
)
"""First parts of a key that are taken for such names, rather than modules', without its path."""
_GROUPS = "param_groups"
_STATES = "state"

_Path = tuple[str | int, ...]
_Value = TypeVar("_Value")


class Sets(Mapping[str, _Value]):
    """Sets of weights by the names of the dicts that lead to them: `app.model`.

    The last part is enough where no other ends so, and the only one there is is `model` too.
    """

    def __init__(self, by_name: Mapping[str, _Value]) -> None:
        self._by_name = by_name

    def __getitem__(self, name: str) -> _Value:
        return self._by_name[self._meant(name)]

    def __iter__(self) -> Iterator[str]:
        return iter(self._by_name)

    def __len__(self) -> int:
        return len(self._by_name)

    def _meant(self, name: str) -> str:
        if name in self._by_name:
            return name
        ending = [each for each in self._by_name if _last(each) == name]
        if not ending and name == MODEL:
            ending = list(self._by_name)
        return ending[0] if len(ending) == 1 else name


@dataclass(frozen=True, kw_only=True)
class Keys:
    """What the keys stand for. Those that are missing here are neither."""

    sets: Sets[Mapping[str, str]]
    """Key of each weight by its name in its set."""
    states: Mapping[str, tuple[str, str]]
    """Parameter and kind of each tensor of the optimizer."""
    groups: Mapping[str, tuple[str, str]]
    """Group and field of each of the optimizer's options. Of several optimizers there are none: it
    isn't said which is whose."""


def read_keys(tensors: Iterable[str], objects: Iterable[str], planner_data: Any) -> Keys:
    """What each key of a tensor, and of what is none, stands for."""
    tensors, objects = list(tensors), list(objects)
    paths = _known(tensors, objects, planner_data) or _guessed(tensors, objects)
    owners = _optimizers(paths.values())
    weights: dict[str, int] = {}
    states: dict[str, int] = {}
    for key in paths:
        length, is_state = _place(paths[key], owners)
        (states if is_state else weights)[key] = length
    tensor_keys = set(tensors)
    told = _states(paths, states)
    is_one = len({paths[key][: states[key]] for key in told}) <= 1
    return Keys(
        sets=_sets((key, paths[key], n) for key, n in weights.items() if key in tensor_keys),
        states={
            key: (name if is_one else key.rpartition(".")[0], field)
            for key, (what, name, field) in told.items()
            if what == _STATES and key in tensor_keys
        },
        groups={
            key: (name, field)
            for key, (what, name, field) in told.items()
            if what == _GROUPS and is_one and key not in tensor_keys
        },
    )


def _known(tensors: list[str], objects: list[str], planner_data: Any) -> dict[str, _Path] | None:
    """The paths as torch kept them; None where it kept none, or was given keys that somebody had
    already joined."""
    if not isinstance(planner_data, Mapping):
        return None
    paths: dict[str, _Path] = {}
    for key in [*tensors, *objects]:
        path = planner_data.get(key)
        if (
            not path
            or not isinstance(path, tuple)
            or not all(isinstance(part, (str, int)) for part in path)
        ):
            return None
        if ".".join(map(str, path)) != key:
            return None
        if len(path) == 1 and key.startswith(("optim.state.", "optimizer.state.")):
            return None
        paths[key] = path
    return paths


def _guessed(tensors: list[str], objects: list[str]) -> dict[str, _Path]:
    """`{"model": state_dict}` and a bare state dict both begin a key with `model.` at times: it is
    a set's name only where every key begins with one."""
    roots = {key.partition(".")[0] for key in tensors} - _GUESSED_STATE
    parts = _GUESSED_STATE | (_SETS if roots <= _SETS else frozenset())
    paths: dict[str, _Path] = {}
    for key in [*tensors, *objects]:
        root, dot, rest = key.partition(".")
        paths[key] = (root, rest) if dot and root in parts else (key,)
    return paths


def _optimizers(paths: Iterable[_Path]) -> set[_Path]:
    """What leads to dicts with groups of parameters."""
    return {
        path[:at]
        for path in paths
        for at, part in enumerate(path)
        if str(part).partition(".")[0] == _GROUPS
    }


def _place(path: _Path, owners: set[_Path]) -> tuple[int, bool]:
    """How many parts lead to the set or the optimizer, and whether it is state."""
    if () in owners and str(path[0]).partition(".")[0] in (_STATES, _GROUPS):
        return 0, True
    for at, part in enumerate(map(str, path[:-1]), 1):
        if part in _SETS:
            return at, False
        if path[:at] in owners or _STATE.fullmatch(part):
            inner = [n for n in range(at, len(path)) if path[:n] in owners]
            return (inner or [at])[-1], True
    return len(path) - 1, False


def _states(
    paths: Mapping[str, _Path], lengths: Mapping[str, int]
) -> dict[str, tuple[str, str, str]]:
    """Of all that an optimizer holds for a parameter or a group: which of both, name and field."""
    told: dict[str, tuple[str, str, str]] = {}
    for key, length in lengths.items():
        what, _, rest = ".".join(map(str, paths[key][length:])).partition(".")
        name, _, field = rest.rpartition(".")
        if what == _GROUPS:
            number, _, inner = rest.partition(".")
            name, field = (number, inner) if number.isdigit() else (name, field)
        if what in (_STATES, _GROUPS) and name:
            told[key] = what, name, field
    return told


def _sets(weights: Iterable[tuple[str, _Path, int]]) -> Sets[Mapping[str, str]]:
    sets: dict[str, dict[str, str]] = {}
    loose: dict[str, str] = {}
    for key, path, length in weights:
        if not length:
            loose[key] = key
            continue
        name, inner = (".".join(map(str, part)) for part in (path[:length], path[length:]))
        sets.setdefault(name, {})[inner] = key
    top = _name_of_loose(loose, sets)
    return Sets(sets if top is None else {top: loose, **sets})


def _name_of_loose(loose: Mapping[str, str], sets: Iterable[str]) -> str | None:
    """The set that tensors are which lie in no dict; None where they are no weights, but what is
    kept beside a model: a count of steps, a random state."""
    are_of_modules = any("." in key for key in loose)
    others = [name for name in sets if _last(name) not in _AVERAGES]
    has_model = any(_last(name) in _MODELS for name in others)
    if not loose:
        return None
    if not others or (are_of_modules and not has_model):
        return MODEL
    return TOP_LEVEL if are_of_modules or not has_model else None


def _last(name: str) -> str:
    return name.rpartition(".")[2]
