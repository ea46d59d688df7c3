"""Proof that a run left a plain Hugging Face model: load it as anyone would, and let it write."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

_LARGEST_BYTES = 256 << 20
_PROMPT_TOKENS = 48
_NEW_TOKENS = 192


def is_small(directory: Path) -> bool:
    """True where loading the model again, and a few words of it on a CPU, cost next to nothing."""
    size = sum(path.stat().st_size for path in directory.glob("*.safetensors"))
    return 0 < size <= _LARGEST_BYTES


def write_sample(directory: Path, *, texts: Iterable[Tensor], seed: int) -> tuple[str, str]:
    """A prompt, and what the model in `directory` writes after it.

    `texts` are int64 [tokens] each. The prompt is the beginning of the one that has most letters
    in it: a table's border would be a poor one.
    """
    tokenizer: Any = AutoTokenizer.from_pretrained(directory)
    model: Any = AutoModelForCausalLM.from_pretrained(directory)
    prompts = {tokenizer.decode(text[:_PROMPT_TOKENS]): text[:_PROMPT_TOKENS] for text in texts}
    prompt = max(prompts, key=lambda text: sum(map(str.isalpha, text)))
    tokens = prompts[prompt].unsqueeze(0)
    positions = getattr(model.config, "max_position_embeddings", None) or _PROMPT_TOKENS
    new_tokens = min(_NEW_TOKENS, positions - tokens.shape[1])
    with torch.random.fork_rng(), torch.inference_mode():
        torch.manual_seed(seed)
        output = model.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            do_sample=True,
            temperature=0.7,
            pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id,
        )[0]
    return prompt, tokenizer.decode(output[tokens.shape[1] :], skip_special_tokens=True)


def as_lines(prompt: str, written: str) -> list[str]:
    """The sample for a console: indented, a mark between what was given and what was written.

    What a terminal might obey rather than show is shown as a dot.
    """
    lines = f"{prompt}▸{written}".splitlines()
    shown = ("".join(c if c.isprintable() else "·" for c in line) for line in lines)
    wrapped = (textwrap.wrap(line, width=88, drop_whitespace=False) for line in shown)
    return [f"    {line}" for parts in wrapped for line in parts if line.strip()]
