"""What is wrong in a section of a run file as a whole, or between two that are each right."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bigtrain.arguments.installed import attention_implementations
from bigtrain.arguments.model_fields import config_faults
from bigtrain.arguments.values import did_you_mean
from bigtrain.layers import Layers
from bigtrain.sections import DataSection, ModelSection


def refuse_impossible(
    layers: Layers, training: Mapping[str, Any], data: DataSection | None
) -> None:
    """Arguments that ask for data which the run file doesn't name."""
    strategy = training.get("eval_strategy", "no")
    if strategy != "no" and data is not None and data.eval_split is None and not data.eval_files:
        what = "but there is nothing to evaluate on; set data.eval_split (0.05, say) or eval_files"
        layers.fault(("training", "eval_strategy"), f"{strategy}, {what}")
    if training.get("do_predict"):
        what = "a run file names no data to predict on; leave it out, or use a script"
        layers.fault(("training", "do_predict"), what)


def check_attention(layers: Layers, model: ModelSection | None) -> None:
    """A name is transformers' own, or a kernel's on the hub; a model's own code may add some."""
    said = model.attn_implementation if model is not None else None
    if said is None or "/" in said or (model is not None and model.trust_remote_code):
        return
    known = attention_implementations()
    if known and said.removeprefix("paged|") not in known and said not in known:
        hint = did_you_mean(said, known) or f"; use {', '.join(known)}"
        layers.fault(("model", "attn_implementation"), f"{said!r} is not supported{hint}")


def check_config(layers: Layers, model: ModelSection | None, data: DataSection | None) -> bool:
    """Whether nothing is wrong in `model.config`, from which memory and buckets are computed."""
    if model is None or model.config is None:
        return True
    length, is_default = 0, False
    if data is not None:
        is_default = "sequence_length" not in data.model_fields_set
        # Which a key that is misspelt may have been to say.
        is_open = is_default and not set(layers.values["data"]) <= set(DataSection.model_fields)
        length = 0 if is_open else data.sequence_length
    faults = list(config_faults(model.config, sequence_length=length, is_default=is_default))
    for key, what in faults:
        layers.fault(("model", "config", key), what)
    return not faults
