"""Adapters as files of PEFT's: with all that was trained, or refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel

from bigtrain.checkpoint.consolidate import consolidate
from bigtrain.errors import CheckpointError
from tests.checkpoint.consolidate.test_adapters import LORA, adapted, llama, logits, write_live

peft = pytest.importorskip("peft")


@pytest.mark.parametrize("biases", ["all", "lora_only"])
@pytest.mark.parametrize("is_whole", [True, False])
def test_biases_that_were_trained_go_along_with_the_adapter(
    is_whole: bool, biases: str, tmp_path: Path
) -> None:
    def base() -> Any:
        torch.manual_seed(0)
        return GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=67))

    options = {"target_modules": ["c_attn"], "fan_in_fan_out": True, "bias": biases}
    model = adapted(base(), options)
    source = write_live(model, tmp_path / "in", trained_only=not is_whole)

    consolidate(source, tmp_path / "out")

    model.save_pretrained(tmp_path / "theirs")
    theirs = load_file(tmp_path / "theirs" / "adapter_model.safetensors")
    ours = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())
    loaded = peft.PeftModel.from_pretrained(base(), tmp_path / "out").eval()
    assert torch.equal(logits(loaded), logits(model))


def test_pefts_own_file_stays_as_it_is(tmp_path: Path) -> None:
    options = LORA | {"bias": "all", "target_modules": ["q_proj", "embed_tokens"]}
    adapted(llama(), options).save_pretrained(tmp_path / "in", save_embedding_layers=True)

    consolidate(tmp_path / "in", tmp_path / "out")

    theirs = load_file(tmp_path / "in" / "adapter_model.safetensors")
    ours = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert any("base_layer" in name for name in ours) and ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())


@pytest.mark.parametrize(
    ("config", "names", "message"),
    [
        ({"peft_type": "ADALORA"}, {}, "it is a ADALORA adapter, which can't be taken out"),
        (
            {"trainable_token_indices": [1]},
            {},
            r"single tokens \(trainable_token_indices\)",
        ),
        ({"bias": "boft_only"}, {}, r"biases that are not known here \(bias: boft_only\), which"),
        ({}, {"emb.token_adapter.trainable_tokens_delta.default": 3}, "trainable_tokens_delta.def"),
        (
            {},
            {"l.lora_E.default": 2},
            r"l\.lora_E\.default belongs to no plain LoRA adapter",
        ),
        ({}, {"l.lora_A.second.weight": 2}, "several adapters: default, second"),
        (
            {},
            {f"h.modules_to_save.{name}.weight": 2 for name in "ab"},
            r"b\.weight is another .*h\.weight",
        ),
    ],
)
def test_what_would_not_come_along_with_the_adapter_is_refused(
    config: dict[str, object], names: dict[str, int], message: str, tmp_path: Path
) -> None:
    shapes = {"base_layer.weight": (4, 3), "lora_A.default.weight": (2, 3)}
    state = {f"l.{name}": torch.ones(shape) for name, shape in shapes.items()}
    state |= {name: torch.ones(numel) for name, numel in names.items()}
    path = tmp_path / "in"
    path.mkdir()
    torch.save({f"base_model.model.{k}": v for k, v in state.items()}, path / "pytorch_model.bin")
    (path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2} | config))
    with pytest.raises(CheckpointError, match=message):
        consolidate(path, tmp_path / "out")


def test_the_file_of_another_kind_of_adapter_keeps_its_names(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    names = [f"base_model.model.l.{name}" for name in ("lora_A", "lora_B", "lora_E")]
    state = {name: torch.randn(2) for name in names}
    save_file(state, tmp_path / "in" / "adapter_model.safetensors")
    (tmp_path / "in" / "adapter_config.json").write_text('{"peft_type": "ADALORA"}')
    consolidate(tmp_path / "in", tmp_path / "out")
    assert load_file(tmp_path / "out" / "adapter_model.safetensors").keys() == state.keys()
