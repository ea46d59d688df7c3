from __future__ import annotations

from pathlib import Path

from bigtrain.data.byte_tokenizer import END_OF_TEXT, VOCABULARY_SIZE, make_byte_tokenizer

HARD_TEXT = "Héllo\n\n  wörld\t\x00 ☃ 日本 e\u0301 <s> [UNK]  "


def test_decoding_gives_back_the_very_text(byte_tokenizer) -> None:
    tokens = byte_tokenizer(HARD_TEXT)["input_ids"]

    assert len(tokens) == len(HARD_TEXT.encode())
    assert byte_tokenizer.decode(tokens) == HARD_TEXT


def test_every_making_numbers_the_bytes_alike() -> None:
    assert make_byte_tokenizer().get_vocab() == make_byte_tokenizer().get_vocab()
    assert len(make_byte_tokenizer()) == VOCABULARY_SIZE


def test_it_is_loaded_by_auto_tokenizer(byte_tokenizer, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    byte_tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)

    assert loaded(HARD_TEXT)["input_ids"] == byte_tokenizer(HARD_TEXT)["input_ids"]
    assert loaded.decode(loaded(HARD_TEXT)["input_ids"]) == HARD_TEXT
    assert loaded.eos_token == END_OF_TEXT
    assert loaded.eos_token_id == loaded.pad_token_id == VOCABULARY_SIZE - 1
