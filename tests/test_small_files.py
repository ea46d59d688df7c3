"""A file that a person names is read whole, or refused in one message, at once."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from bigtrain.errors import ConfigError
from bigtrain.small_files import read_small_text


def test_a_small_file_is_read_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes("grün\r\n".encode())

    assert read_small_text(path, label="here", limit=7) == "grün\r\n"


def test_what_is_no_small_text_file_is_refused_at_once(tmp_path: Path) -> None:
    large, binary, pipe = tmp_path / "large", tmp_path / "binary", tmp_path / "pipe"
    large.write_text("12345678")
    binary.write_bytes(b"\xff")
    os.mkfifo(pipe)
    expected = {
        large: "here: too large (over 7 bytes)",
        binary: "here: not text in UTF-8",
        pipe: "here: can't be read: not a regular file",
        Path("/dev/zero"): "here: can't be read: not a regular file",
        tmp_path: "here: can't be read: Is a directory",
        tmp_path / "nowhere": "here: can't be read: No such file or directory",
        Path("a\0b"): "here: can't be read: embedded null byte",
    }

    for path, message in expected.items():
        with pytest.raises(ConfigError) as raised:
            read_small_text(path, label="here", limit=7)
        assert str(raised.value) == message
