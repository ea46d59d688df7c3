"""Text files that people write: read whole, and only if they are small and are files.

A pipe would be waited for and a device read for ever; each ends in one message instead.
"""

from __future__ import annotations

import stat
from pathlib import Path

from bigtrain.errors import ConfigError


def read_small_text(path: Path, *, label: str, limit: int = 16 << 20) -> str:
    """The UTF-8 text of at most `limit` bytes in the file at `path`.

    ConfigError that begins with `label` where it is no regular file, is larger, is no UTF-8 or
    can't be read.
    """
    try:
        content = _read_bytes(path, limit + 1)
    except (OSError, ValueError) as error:  # a name with a null byte is a ValueError
        why = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(f"{label}: can't be read: {why}") from None
    if content is None:
        raise ConfigError(f"{label}: can't be read: not a regular file")
    if len(content) > limit:
        raise ConfigError(f"{label}: too large (over {limit} bytes)")
    try:
        return content.decode()
    except UnicodeDecodeError:
        raise ConfigError(f"{label}: not text in UTF-8") from None


def _read_bytes(path: Path, most: int) -> bytes | None:
    """The first `most` bytes; None of what is neither a file nor a directory."""
    mode = path.stat().st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        return None
    with path.open("rb") as file:
        return file.read(most)
