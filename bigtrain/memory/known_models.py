"""Configs of the hub models that the ready run files and the README name: they can be planned
undownloaded.

As published in each repository's `config.json`; only what shapes follow from.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_LLAMA_3 = {"model_type": "llama", "vocab_size": 128_256, "num_key_value_heads": 8}

KNOWN_MODELS: Mapping[str, Mapping[str, Any]] = {
    "meta-llama/Meta-Llama-3-8B": {
        **_LLAMA_3,
        "hidden_size": 4096,
        "intermediate_size": 14_336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
    },
    "meta-llama/Meta-Llama-3-70B": {
        **_LLAMA_3,
        "hidden_size": 8192,
        "intermediate_size": 28_672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
    },
    "Qwen/Qwen2.5-7B": {
        "model_type": "qwen2",
        "vocab_size": 152_064,
        "hidden_size": 3584,
        "intermediate_size": 18_944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
    },
    "Qwen/Qwen3-0.6B": {
        "model_type": "qwen3",
        "vocab_size": 151_936,
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "tie_word_embeddings": True,
    },
    "mistralai/Mixtral-8x7B-v0.1": {
        "model_type": "mixtral",
        "vocab_size": 32_000,
        "hidden_size": 4096,
        "intermediate_size": 14_336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
    },
}
"""Repository → config. Their weights are stored in bf16."""
