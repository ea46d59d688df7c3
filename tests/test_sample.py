from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from bigtrain.sample import as_lines, is_small, write_sample


def test_a_saved_model_goes_on_from_the_text_with_most_letters(
    make_tiny_llama, byte_tokenizer, tmp_path: Path
) -> None:
    make_tiny_llama(vocab_size=len(byte_tokenizer), max_position_embeddings=512).save_pretrained(
        tmp_path
    )
    byte_tokenizer.save_pretrained(tmp_path)
    texts = [torch.tensor(byte_tokenizer(text)["input_ids"]) for text in ("+--+--+", "A word.")]

    prompt, written = write_sample(tmp_path, texts=texts, seed=1)

    assert is_small(tmp_path)
    assert prompt == "A word."
    assert written == write_sample(tmp_path, texts=texts, seed=1)[1]


def test_an_empty_directory_holds_no_small_model(tmp_path: Path) -> None:
    assert not is_small(tmp_path)


def test_a_console_is_not_given_what_it_might_obey() -> None:
    lines = as_lines("Once", " upon\x1b[2J a\x07 time\n\n" + "x" * 100)

    assert lines[0] == "    Once▸ upon·[2J a· time"
    assert all(line.isprintable() and len(line) <= 92 for line in lines)
    assert "".join(lines).count("x") == 100


def test_a_model_with_few_positions_writes_as_far_as_they_go(
    tmp_path: Path, make_tiny_llama: Any, byte_tokenizer: Any
) -> None:
    make_tiny_llama(vocab_size=257, max_position_embeddings=64).save_pretrained(tmp_path)
    byte_tokenizer.save_pretrained(tmp_path)
    prompt, written = write_sample(
        tmp_path, texts=[torch.tensor(byte_tokenizer("A" * 200)["input_ids"])], seed=1
    )
    assert prompt == "A" * 48
    assert 0 < len(written) <= 16  # at most a character for each of the positions left
