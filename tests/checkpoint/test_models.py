"""Models of transformers keep every weight by name, however `save_pretrained` stores them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bigtrain.topology import RankInfo
from tests.checkpoint.stand_in import StandIn, assert_same_local_state, blank, save

SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
CONFIGS = {
    "llama": {},
    "llama-tied": {"tie_word_embeddings": True},
    "qwen2": {},
    "mixtral": {"num_local_experts": 2},
}


def make_model(name: str, seed: int) -> tuple[torch.nn.Module, torch.optim.AdamW]:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    kind = name.partition("-")[0]
    config = AutoConfig.for_model(kind, **SMALL, **CONFIGS[name])
    model = AutoModelForCausalLM.from_config(config)
    optimizer = torch.optim.AdamW(model.parameters())
    tokens = torch.randint(0, 64, (1, 8))
    model(input_ids=tokens, labels=tokens).loss.backward()
    optimizer.step()
    return model, optimizer


@pytest.mark.parametrize("name", CONFIGS)
def test_a_model_comes_back_by_name_to_the_last_bit(tmp_path: Path, name: str) -> None:
    from bigtrain.checkpoint.load import open_checkpoint

    model, optimizer = make_model(name, seed=0)
    engine = StandIn(model, optimizer, world=RankInfo(), is_sharded=False)
    save(tmp_path / "c", engine, write_files=lambda path: model.save_pretrained(path))
    loaded = StandIn(*blank(make_model(name, seed=1)), world=RankInfo(), is_sharded=False)
    with open_checkpoint(tmp_path / "c") as checkpoint:
        loaded.load_local_state(checkpoint.source, optimizer=True)
    assert_same_local_state(loaded, engine)
    # Only what save_pretrained changes on the way is stored a second time.
    extra = (tmp_path / "c" / "training_weights.safetensors").exists()
    assert extra == (name == "mixtral")
