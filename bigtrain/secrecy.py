"""What must not be written down: plans are files, and other people can read them.

Names tell it, of a variable or of a script's argument. Some of their words are used of harmless
things too (`--pad_token`, `--sort_key`): of an argument with such a name, the value decides.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import pairwise

SECRET_ADVICE = (
    "a secret's value must not be written into a plan; "
    "export it where bigtrain is started, and every rank inherits it"
)
_ALWAYS = frozenset(
    {
        "APIKEY",
        "CREDENTIAL",
        "CREDENTIALS",
        "PASSCODE",
        "PASSPHRASE",
        "PASSWD",
        "PASSWORD",
        "PAT",
        "PWD",
        "SECRET",
        "SECRETS",
    }
)
_MAYBE = frozenset({"KEY", "TOKEN"})
_ENDINGS = ("APIKEY", "CREDENTIAL", "CREDENTIALS", "PASSPHRASE", "PASSWD", "PASSWORD", "PWD")
_MAYBE_ENDINGS = ("SECRET", "TOKEN")
_PLACES = ("_PATH", "_FILE", "_DIR")
_NOT_SECRET = frozenset({"PWD", "OLDPWD"})  # the shell's working directories
# How services begin their tokens; what follows is random.
_SERVICES_TOKEN = re.compile(
    r"\b(?:hf_|sk-|ghp_|gho_|ghs_|github_pat_|glpat-|xox[abp]-|AKIA|eyJ)[\w.-]{12,}"
)
_TOKEN = re.compile(rf"{_SERVICES_TOKEN.pattern}|[0-9a-f]{{40}}")
_RANDOM = re.compile(r"(?=.*\d)(?=.*[A-Za-z])[\w.+=~-]{16,}")


def looks_secret(variable: str) -> bool:
    """True where a variable's name says that its value is a secret: `HF_TOKEN`, `WANDB_API_KEY`."""
    return variable.upper() not in _NOT_SECRET and any(
        word in _ALWAYS | _MAYBE or word.endswith(_ENDINGS + _MAYBE_ENDINGS)
        for word in _words(variable)
    )


def holds_secret(variable: str, value: object) -> bool:
    """True where a variable's value is a secret, and not the path of a file that holds one."""
    is_place = variable.upper().endswith(_PLACES) and "/" in str(value)
    return looks_secret(variable) and not is_place


def holds_token(text: str) -> bool:
    """Whether a service's token stands somewhere in a text, such as a command of a shell's."""
    return _SERVICES_TOKEN.search(text) is not None


def argument_faults(arguments: Sequence[str]) -> list[str]:
    """A fault for each argument of a script whose value is a secret. It never shows the value."""
    return [
        f"{name}: {SECRET_ADVICE}" if name else f"one of the script's arguments: {SECRET_ADVICE}"
        for name, value in _named(arguments)
        if _is_secret(name, value)
    ]


def _named(arguments: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Each value with the option that it belongs to, which is empty where it stands alone."""
    for before, argument in pairwise(("", *arguments)):
        if argument.startswith("-"):
            name, equals, value = argument.partition("=")
            if equals:
                yield name, value
        elif before.startswith("-") and "=" not in before:
            yield before, argument
        else:
            name, equals, value = argument.partition("=")  # as Hydra's overrides are written
            yield (name, value) if equals else ("", argument)


def _is_secret(name: str, value: str) -> bool:
    if _TOKEN.fullmatch(value):
        return True
    words = _words(name)
    if any(word in _ALWAYS or word.endswith(_ENDINGS) for word in words):
        return bool(value) and value.lower() not in ("true", "false", "none")
    if any(word in _MAYBE or word.endswith(_MAYBE_ENDINGS) for word in words):
        return _RANDOM.fullmatch(value) is not None
    return False


def _words(name: str) -> list[str]:
    return [word for word in re.split(r"[_\-.]+", name.upper()) if word]
