"""Paths as a user writes them: from where the command was given, or from a home directory."""

from __future__ import annotations

from pathlib import Path

from bigtrain.errors import ConfigError


def expand_home(text: str, *, label: str = "") -> Path:
    """`~` and `~user` as the home they stand for. ConfigError where there is no such user.

    `label` is where the path was said, for that message.
    """
    try:
        return Path(text).expanduser()
    except RuntimeError:
        where = f"{label}: " if label else ""
        raise ConfigError(f"{where}{text}: there is no such home directory") from None


def below(root: Path, text: str, *, label: str = "") -> Path:
    """The path that `text` names for a command that is given in `root`; else as `expand_home`."""
    return root / expand_home(text, label=label)
