"""What is done to a model before it trains."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from bigtrain import TrainingArguments
from bigtrain.trainer import preparation


@pytest.mark.parametrize("said", [True, False])
def test_recomputation_is_what_fsdp_s_config_asks_for(said: bool, tmp_path: Path) -> None:
    config = LlamaConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=8
    )
    args = TrainingArguments(
        output_dir=str(tmp_path),
        use_cpu=True,
        report_to="none",
        fsdp=True,
        fsdp_config={"activation_checkpointing": said},
    )
    model = LlamaForCausalLM(config)
    trainer: Any = SimpleNamespace(args=args, model=model, processing_class=None)

    preparation.prepare_model(trainer)

    assert model.is_gradient_checkpointing == said
