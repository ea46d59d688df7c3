"""Text for a terminal: names of files, keys and tensors can hold what it would obey."""

from __future__ import annotations


def printable(text: str) -> str:
    """The text on one line, with escapes for what is no printable character."""
    if text.isprintable():
        return text
    shown = (c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return "".join(shown)
