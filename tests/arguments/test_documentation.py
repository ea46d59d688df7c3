"""docs/arguments.md says what the code and its tests say."""

from __future__ import annotations

from tests.arguments.documentation import PATH, document


def test_the_page_is_as_it_would_be_written_now() -> None:
    hint = "run python -m tests.arguments.documentation"
    assert PATH.read_text(encoding="utf-8") == document(), hint
