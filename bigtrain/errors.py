"""Every error that a user can cause, as one tree.

A mistake of the user's raises a subclass of `BigtrainError`. Only the command line catches it,
prints its message and leaves with its `exit_code`; a traceback is kept for faults of our own.
A message says what is wrong, where that was said, and how to mend it.
"""

from __future__ import annotations

from collections.abc import Sequence


class BigtrainError(Exception):
    """Root of the tree."""

    exit_code = 1


class ConfigError(BigtrainError, ValueError):
    """A run file, a flag or an argument can't be used. Holds all faults, not only the first.

    A ValueError too, because that is what scripts of transformers' Trainer catch.
    """

    exit_code = 2

    def __init__(self, faults: str | Sequence[str]) -> None:
        self.faults = (faults,) if isinstance(faults, str) else tuple(faults)
        super().__init__("\n".join(self.faults))


class UnsupportedError(ConfigError):
    """What was asked for exists, but not on this engine, device or platform."""


class DataError(BigtrainError):
    """The training data can't be found or read."""

    exit_code = 3


class CheckpointError(BigtrainError):
    """A checkpoint can't be written, found, trusted or loaded."""

    exit_code = 4


class LaunchError(BigtrainError):
    """The ranks could not be started or joined."""

    exit_code = 5
