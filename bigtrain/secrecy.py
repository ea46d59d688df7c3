"""What must not be written down: plans are files, and other people can read them.

Names tell it, of a variable, of a key or of a script's argument. Some of their words are used of
harmless things too (`--pad_token`, `--sort_key`): where a name has no other, the value decides. A
service's token and a login in an address are secrets whatever their name.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from itertools import pairwise

from bigtrain.layers import plain_values

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
_ALWAYS_TOGETHER = ("_ACCESS_KEY_", "_API_KEY_", "_PRIVATE_KEY_")
_MAYBE = frozenset({"KEY", "TOKEN"})
_ENDINGS = ("APIKEY", "CREDENTIAL", "CREDENTIALS", "PASSPHRASE", "PASSWD", "PASSWORD", "PWD")
_MAYBE_ENDINGS = ("SECRET", "TOKEN")
_PLACES = ("_PATH", "_FILE", "_DIR")
_NOT_SECRET = frozenset({"PWD", "OLDPWD"})  # the shell's working directories
# How services begin their tokens; what follows is random.
_SERVICES_TOKEN = re.compile(
    r"\b(?:hf_|sk-|ghp_|gho_|ghs_|github_pat_|glpat-|xox[abp]-|AKIA|eyJ)[\w.-]{12,}"
)
# Tells a token from `hf_cache_dir` and `sk-learn-baseline`.
_RANDOM_RUN = re.compile(r"[A-Za-z0-9]{16}")
_LOGIN = re.compile(r"://[^/\s:@]+:[^/\s@]+@")
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
    return looks_secret(variable) and not _is_place(variable, str(value))


def _is_place(name: str, value: str) -> bool:
    return name.upper() in _NOT_SECRET or (name.upper().endswith(_PLACES) and "/" in value)


def holds_token(text: str) -> bool:
    """Whether a service's token stands somewhere in a text, such as a command of a shell's."""
    return _SERVICES_TOKEN.search(text) is not None


def is_secret(name: str, value: object) -> bool:
    """True of a key's value that is a secret by its name or by its looks."""
    return isinstance(value, str) and (_is_named_so(name, value) or _holds_one(value))


def _holds_one(text: str) -> bool:
    """A token, a login, or a secret with its name: `token=…,b=1`, or a mapping that is text yet."""
    tokens = (found[0] for found in _SERVICES_TOKEN.finditer(text))
    if any(_RANDOM_RUN.search(token) for token in tokens) or _LOGIN.search(text):
        return True
    pairs = (pair.partition("=") for pair in text.split(","))
    if any(_is_named_so(name.strip(), value.strip()) for name, equals, value in pairs if equals):
        return True
    try:
        inner = json.loads(text) if text.lstrip().startswith("{") else {}
        return any(is_secret(path[-1], each) for path, each in plain_values(inner) if path)
    except (ValueError, RecursionError):
        return False


def masked(text: str) -> str:
    """A message without the rest of a service's token, wherever it was repeated."""
    return _SERVICES_TOKEN.sub(_cut, text)


def _cut(found: re.Match[str]) -> str:
    return f"{found[0][:3]}…" if _RANDOM_RUN.search(found[0]) else found[0]


def argument_faults(arguments: Sequence[str]) -> list[str]:
    """A fault for each argument of a script whose value is a secret. It never shows the value."""
    return [
        f"{name}: {SECRET_ADVICE}" if name else f"one of the script's arguments: {SECRET_ADVICE}"
        for name, value in _named(arguments)
        if _is_secret_argument(name, value)
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


def _is_secret_argument(name: str, value: str) -> bool:
    return _TOKEN.fullmatch(value) is not None or _is_named_so(name, value)


def _is_named_so(name: str, value: str) -> bool:
    if _is_place(name, value):
        return False
    words = _words(name)
    is_named = any(together in f"_{'_'.join(words)}_" for together in _ALWAYS_TOGETHER)
    if is_named or any(word in _ALWAYS or word.endswith(_ENDINGS) for word in words):
        return bool(value) and value.lower() not in ("true", "false", "none")
    if any(word in _MAYBE or word.endswith(_MAYBE_ENDINGS) for word in words):
        return _RANDOM.fullmatch(value) is not None
    return False


def _words(name: str) -> list[str]:
    return [word for word in re.split(r"[_\-.]+", name.upper()) if word]
