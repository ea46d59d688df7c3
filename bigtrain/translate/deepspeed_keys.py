"""What is wrong with the keys and types of a DeepSpeed JSON, by the installed DeepSpeed's sources.

DeepSpeed takes a misspelt key at the top and in some sections without a word, and a number that is
written as text until something divides by it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from bigtrain.arguments.values import did_you_mean
from bigtrain.translate.deepspeed_sources import (
    AUTO,
    KIND_WORDS,
    Kinds,
    bounds_of_numbers,
    dotted,
    known_keys,
    removed_keys,
)

# What DeepSpeed's sources declare no type for.
_UNDECLARED: Mapping[str, Kinds] = {
    **dict.fromkeys(
        ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"),
        frozenset({"int"}),
    ),
    **dict.fromkeys(
        ("steps_per_print", "sequence_parallel_size", "vocabulary_size"), frozenset({"int"})
    ),
    **dict.fromkeys(("tensor_parallel", "pipeline", "expert_parallel"), frozenset({"dict"})),
    **dict.fromkeys(
        ("communication_data_type", "gradient_allreduce_op", "checkpoint.tag_validation"),
        frozenset({"str"}),
    ),
    **dict.fromkeys(
        ("data_types.grad_accum_dtype", "data_types.buffer_dtype", "torch_autocast.dtype"),
        frozenset({"str"}),
    ),
    "data_types.keep_in_fp32_modules": frozenset({"list"}),
    "torch_autocast.lower_precision_safe_modules": frozenset({"list"}),
    "zero_optimization.offload_optimizer.device": frozenset({"str"}),
    "zero_optimization.offload_param.device": frozenset({"str"}),
    "zero_optimization.offload_optimizer.nvme_path": frozenset({"str"}),
    "zero_optimization.offload_param.nvme_path": frozenset({"str"}),
}


def unknown(given: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong, and the fix, for each key that DeepSpeed does not have."""
    known, removed = known_keys(), removed_keys()
    for section, key, _ in _walk(given, ""):
        path, keys = dotted(section, key), known.get(section)
        if path in removed:
            yield f"{path}: DeepSpeed has this no more, and refuses it; leave it out"
        elif keys and key not in keys:
            yield f"{path} is no key of DeepSpeed's{did_you_mean(key, keys)}"


def said(given: Mapping[str, Any]) -> Iterator[str]:
    """Each dotted key that DeepSpeed has too, of sections inside sections as well."""
    known = known_keys()
    for section, key, _ in _walk(given, ""):
        if key in known.get(section, ()):
            yield dotted(section, key)


def every_key() -> frozenset[str]:
    """All dotted keys that the installed DeepSpeed has; empty where there is none."""
    return frozenset(dotted(section, key) for section, keys in known_keys().items() for key in keys)


def mistyped(given: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(key, what is wrong) for each value of another type than DeepSpeed takes, or out of its
    bounds."""
    known = known_keys()
    for section, key, value in _walk(given, ""):
        path = dotted(section, key)
        if isinstance(value, float) and not math.isfinite(value):
            yield path, f"{path} is {value} there, not a finite number"
            continue
        kinds = _UNDECLARED.get(path) or known.get(section, {}).get(key)
        if kinds and value not in (None, AUTO) and not any(_is(value, kind) for kind in kinds):
            wanted = " or ".join(KIND_WORDS[kind] for kind in sorted(kinds))
            yield path, f"{path} is {value!r} there, not {wanted}"
            continue
        for word, holds, bound in bounds_of_numbers().get(path, ()):
            if isinstance(value, (int, float)) and not holds(value, bound):
                yield path, f"{path} is {value} there; it must be {word} {bound}"


def _walk(section: Mapping[str, Any], name: str) -> Iterator[tuple[str, str, Any]]:
    """Section, key and value, of sections inside it too; of an unknown section nothing inside."""
    known = known_keys().get(name)
    for key, value in section.items():
        yield name, key, value
        if isinstance(value, Mapping) and not (known and key not in known):
            yield from _walk(value, dotted(name, key))


def _is(value: Any, kind: str) -> bool:
    if kind in ("int", "float"):  # 5e8 is a whole number, too
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        return is_number and (kind == "float" or value == int(value))
    return type(value).__name__ == kind
