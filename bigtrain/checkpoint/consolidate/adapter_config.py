"""What PEFT's configuration says of an adapter: how strong it is, whether biases were trained with
it, and whether it can be merged.

Merged is what is known: a plain W + scaling · B·A, on the W that the model's own files hold. Any
other way to begin, and any field that isn't known here, is refused by its name.
https://github.com/huggingface/peft/blob/main/src/peft/tuners/lora/config.py
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bigtrain.checkpoint.json_object import json_object
from bigtrain.errors import CheckpointError

ADAPTER_CONFIG = "adapter_config.json"
NO_BIASES = "none"
ADAPTED_BIASES = "lora_only"
"""Those of the layers that are adapted."""
BIASES = (NO_BIASES, ADAPTED_BIASES, "all")
NOT_TAKEN_OUT = (
    "which can't be taken out of its model here; load the checkpoint into the PEFT model, and save "
    "that by its save_pretrained"
)
_LEAVES_THE_MODEL = ("true", "false", "gaussian", "orthogonal", "eva", "mica")
"""Ways to begin that choose A and B alone."""
_CHANGES_THE_MODEL = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Ways to begin after which W is not what the model's own files say."""
_USED = (
    "alpha_pattern",
    "base_model_name_or_path",
    "fan_in_fan_out",
    "init_lora_weights",
    "lora_alpha",
    "peft_type",
    "r",
    "rank_pattern",
    "use_rslora",
)
_WITHOUT_EFFECT = (
    "auto_mapping",
    "corda_config",
    "ensure_weight_tying",
    "eva_config",
    "exclude_modules",
    "inference_mode",
    "layers_pattern",
    "layers_to_transform",
    "loftq_config",
    "lora_dropout",
    "lora_ga_config",
    "megatron_core",
    "modules_to_save",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "target_modules",
    "task_type",
    "velora_config",
)
"""Once the names and shapes of A and B are known."""
_NAMED = {
    "use_dora": "it uses DoRA",
    "lora_bias": "it trains biases (lora_bias)",
    "trainable_token_indices": "it trains single tokens",
    "target_parameters": "it targets parameters",
}


def read_adapter_config(path: Path | None, *, has_base: bool) -> dict[str, Any]:
    """PEFT's configuration of the adapter; CheckpointError where it can't be merged by it.

    `has_base` says that the weights which the adapter was trained on lie beside it.
    """
    if path is None:
        raise CheckpointError(
            f"there is no {ADAPTER_CONFIG} beside the adapter, which says how strong it is; put it "
            "there to merge it"
        )
    config = _read(path)
    _check_types(path, config)
    if reason := _hindrance(config, has_base=has_base):
        raise CheckpointError(
            f"{path}: {reason}, which can't be merged here; merge it by PEFT's "
            "merge_and_unload, or leave out --merge-adapter"
        )
    return config


def trained_biases(path: Path | None) -> str:
    """Which of a live model's biases were trained with its adapter: one of `BIASES`.

    CheckpointError where more was trained than biases and what a LoRA adapter's names tell.
    """
    config = _read(path) if path is not None else {}
    biases = config.get("bias") or NO_BIASES
    reason = None
    if (kind := config.get("peft_type", "LORA")) != "LORA":
        reason = f"it is a {kind} adapter"
    elif config.get("trainable_token_indices"):
        reason = f"{_NAMED['trainable_token_indices']} (trainable_token_indices)"
    elif biases not in BIASES:
        reason = f"it trains biases that are not known here (bias: {biases})"
    if reason:
        raise CheckpointError(f"{path}: {reason}, {NOT_TAKEN_OUT}")
    return str(biases)


def _read(path: Path) -> dict[str, Any]:
    try:
        return json_object(path.read_bytes())
    except ValueError as fault:
        raise CheckpointError(f"{path}: not JSON ({fault}); it is damaged") from fault


def _check_types(path: Path, config: dict[str, Any]) -> None:
    wrong = {
        "alpha_pattern": not _are_patterns(config.get("alpha_pattern"), _is_number),
        "rank_pattern": not _are_patterns(config.get("rank_pattern"), _is_rank),
        "lora_alpha": not _is_number(config.get("lora_alpha", 8)),
        "r": not _is_rank(config.get("r", 8)),
        "base_model_name_or_path": not isinstance(
            config.get("base_model_name_or_path"), str | None
        ),
    }
    if found := [key for key, is_wrong in wrong.items() if is_wrong]:
        raise CheckpointError(
            f"{path}: {found[0]} is {config[found[0]]!r}, which PEFT never writes"
        )


def _is_number(value: Any) -> bool:
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number of hundreds of digits
        return False


def _is_rank(value: Any) -> bool:
    return type(value) is int and value > 0


def _are_patterns(value: Any, is_right: Callable[[Any], bool]) -> bool:
    """Whether it says right things of modules by patterns of their names, or nothing."""
    if not isinstance(value, dict | None):
        return False
    return all(_is_pattern(key) and is_right(said) for key, said in (value or {}).items())


def _is_pattern(text: str) -> bool:
    try:
        re.compile(text)
    except (re.error, RecursionError):
        return False
    return True


def _hindrance(config: dict[str, Any], *, has_base: bool) -> str | None:
    kind = config.get("peft_type")
    if kind != "LORA":
        return f"it is a {kind} adapter"
    if (biases := config.get("bias") or "none") != "none":
        return f"it trains biases (bias: {biases})"
    for key, value in config.items():
        if value and key not in (*_USED, *_WITHOUT_EFFECT, "bias"):
            return _NAMED.get(key, f"it uses {key}")
    return None if has_base else _changed_model(str(config.get("init_lora_weights", True)))


def _changed_model(beginning: str) -> str | None:
    """Why the weights that the adapter was trained on aren't those of the model's own files."""
    how = beginning.lower()
    if how in _LEAVES_THE_MODEL:
        return None
    if how.startswith(_CHANGES_THE_MODEL):
        return f"its beginning ({beginning}) changed the model's own weights"
    return (
        f"its beginning ({beginning}) is not known here, and may have changed the model's weights"
    )
