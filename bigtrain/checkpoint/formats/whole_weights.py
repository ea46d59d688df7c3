"""A model's weights as nobody divided them: `model.safetensors` or `pytorch_model.bin`, in shards
or not."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from bigtrain.checkpoint.formats import torch_state_dict, transformers_dir
from bigtrain.checkpoint.formats.safetensors import read_safetensors
from bigtrain.checkpoint.formats.torch_state_dict import read_state_dict
from bigtrain.checkpoint.index import TensorIndex
from bigtrain.checkpoint.json_object import check_indexed, indexed_files
from bigtrain.errors import CheckpointError


def read_whole_weights(
    directory: Path, *, safetensors: Sequence[Path], state_dicts: Sequence[Path]
) -> TensorIndex:
    """The tensors of the first files, where there are any, else of the others.

    CheckpointError where an index names files or tensors that aren't there.
    """
    files = safetensors or state_dicts
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise CheckpointError(f"{directory}: {', '.join(missing)} missing; its index names them")
    found = read_safetensors(files) if safetensors else read_state_dict(files)
    index = directory / (transformers_dir if safetensors else torch_state_dict).WEIGHTS_INDEX
    if index.is_file() and set(files) == set(indexed_files(index)):
        check_indexed(index, {name for name, _ in found.entries})
    return found
