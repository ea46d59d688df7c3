"""Reading a value that a human wrote as the type that its field declares."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable
from typing import Any

from bigtrain.arguments.schema import Field

_TRUE = frozenset({"true", "yes", "on"})
_FALSE = frozenset({"false", "no", "off"})
_SYNONYMS = {"eval_strategy": {"epochs": "epoch"}}
_LEAST = {
    "gradient_accumulation_steps": 1,
    "per_device_eval_batch_size": 1,
    "per_device_train_batch_size": 1,
}
TOO_LARGE = 2**63
TOO_LARGE_ADVICE = "too large a number: none may have 64 bits or more"
_KIND_NAMES = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "str": "text",
    "list": "a list",
    "dict": "a mapping",
}


def nearest(word: str, candidates: Iterable[str]) -> str | None:
    """The candidate that was probably meant, if one is close."""
    close = difflib.get_close_matches(word, list(candidates), n=1, cutoff=0.6)
    return close[0] if close else None


def did_you_mean(word: str, candidates: Iterable[str]) -> str:
    """`; did you mean 'x'?`, or nothing where no candidate is close."""
    close = nearest(word, candidates)
    return f"; did you mean {close!r}?" if close else ""


def read_value(field: Field, value: Any) -> Any:
    """`value` as one of the field's kinds. ValueError that says what it should be instead."""
    if value is None:
        if field.optional:
            return None
        raise ValueError(f"has no value; give {_wanted(field)}, or leave it out")
    if isinstance(value, bool):
        return _read_bool(field, value)
    if isinstance(value, (int, float)):
        return _read_number(field, value)
    if isinstance(value, str):
        return _read_text(field, value)
    kind = "list" if isinstance(value, list) else "dict"
    if kind not in field.kinds:
        raise _mismatch(field, value)
    return value


def _read_bool(field: Field, value: bool) -> Any:
    if "bool" in field.kinds:
        return value
    raise _mismatch(field, value)


def _read_number(field: Field, value: int | float) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        raise _mismatch(field, value)
    if abs(value) >= TOO_LARGE and (isinstance(value, int) or "float" not in field.kinds):
        raise ValueError(TOO_LARGE_ADVICE)
    least = _LEAST.get(field.name)
    if least is not None and value < least:
        raise ValueError(f"{value} is too small; it must be at least {least}")
    if "float" in field.kinds:
        return value
    if "int" in field.kinds and value == int(value):
        return int(value)
    raise _mismatch(field, value)


def _read_text(field: Field, value: str) -> Any:
    lowered = value.strip().lower()
    if "bool" in field.kinds and lowered in _TRUE | _FALSE and "str" not in field.kinds:
        return lowered in _TRUE
    if "str" not in field.kinds:
        number = _number(value)
        if number is None:
            raise _mismatch(field, value)
        return _read_number(field, number)
    value = _SYNONYMS.get(field.name, {}).get(value, value)
    if field.choices and value not in field.choices and "list" not in field.kinds:
        hint = did_you_mean(value, field.choices)
        raise ValueError(f"{value!r} is not one of {', '.join(field.choices)}{hint}")
    return value


def _number(text: str) -> int | float | None:
    for read in (int, float):
        try:
            return read(text)
        except ValueError:
            continue
    return None


def _mismatch(field: Field, value: Any) -> ValueError:
    return ValueError(f"{_spelled(value)} is not {_wanted(field)}")


def _spelled(value: Any) -> str:
    text = str(value).lower() if isinstance(value, bool) else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _wanted(field: Field) -> str:
    names = [_KIND_NAMES[kind] for kind in field.kinds if kind in _KIND_NAMES]
    return " or ".join(names) if names else "something that a run file can say; leave it out"
