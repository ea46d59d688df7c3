"""What lies beside the weights: all that from_pretrained reads comes along, and no more."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers.models
from transformers import AutoConfig

from bigtrain.checkpoint.consolidate import consolidate
from bigtrain.checkpoint.consolidate.side_files import is_side_file
from bigtrain.errors import ConfigError
from tests.checkpoint.consolidate.test_consolidate import plain

WEIGHTS = {"w": torch.randn(3)}
MODULES = {
    "configuration_x.py": (
        "from transformers import PretrainedConfig\nfrom .blocks import WIDTH\n"
        "class X(PretrainedConfig):\n    model_type = 'x'\n    width = WIDTH\n"
    ),
    "blocks.py": "WIDTH = 7\n",
}


def tokenizer_files() -> Iterator[str]:
    """By which names the tokenizers of transformers look for their files."""
    for path in Path(transformers.models.__path__[0]).glob("*/tokenization_*.py"):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.Assign) and "VOCAB_FILES_NAMES" in ast.unparse(node.targets[0]):
                yield from ast.literal_eval(node.value).values()


def test_the_files_of_every_tokenizer_of_transformers_are_known() -> None:
    names = set(tokenizer_files())
    assert len(names) > 15
    assert [name for name in sorted(names) if not is_side_file(Path(name))] == []


@pytest.mark.parametrize(
    "name",
    ["source.spm", "bpe.codes", "spm.model", "normalizer.json", "dict.txt", "vocab-src.json"],
)
def test_they_come_along(name: str, tmp_path: Path) -> None:
    source = plain(tmp_path / "in", WEIGHTS)
    (source / name).write_bytes(b"as it is")
    consolidate(source, tmp_path / "out")
    assert (tmp_path / "out" / name).read_bytes() == b"as it is"


def test_a_models_own_code_comes_along_with_what_it_imports(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = plain(tmp_path / "in", WEIGHTS)
    for name, text in {**MODULES, "zero_to_fp32.py": "of DeepSpeed"}.items():
        (source / name).write_text(text)
    config = '{"model_type": "x", "auto_map": {"AutoConfig": "configuration_x.X"}}'
    (source / "config.json").write_text(config)

    consolidate(source, tmp_path / "out")

    assert not (tmp_path / "out" / "zero_to_fp32.py").exists()
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "c"))
    assert AutoConfig.from_pretrained(tmp_path / "out", trust_remote_code=True).width == 7


def test_scripts_that_are_not_a_models_stay_where_they_are(tmp_path: Path) -> None:
    source = plain(tmp_path / "in", WEIGHTS)
    (source / "train.py").touch()
    with pytest.raises(ConfigError, match=r"train\.py in it are not known to belong"):
        consolidate(source, tmp_path / "out", remove_source=True)
    consolidate(source, tmp_path / "out")
    assert not (tmp_path / "out" / "train.py").exists()


def test_an_empty_configuration_is_written_too(tmp_path: Path) -> None:
    source = plain(tmp_path / "in", WEIGHTS)
    (source / "config.json").write_text("{}")
    consolidate(source, tmp_path / "out")
    assert (tmp_path / "out" / "config.json").read_text() == "{}\n"
