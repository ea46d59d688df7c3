"""Slurm's short form of many host names: `rack[01-02]n[03-04,7],login1`, written out.

Same names in the same order as `scontrol show hostnames`, without asking for it: a container has
no Slurm commands, and 4,096 nodes that all ask at once are a burden on the controller.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator

from bigtrain.errors import LaunchError

_MOST_HOSTS = 65_536
"""As Slurm's own limit: a short text must not become endless work."""

_WORD = re.compile(r"(?:[^\s,\[\]]+|\[[^\s\[\]]*\])+")
_SEPARATORS = re.compile(r"[\s,]*")
_PIECE = re.compile(r"\[([^\]]*)\]|([^\[\]]+)")
_RANGE = re.compile(r"(\d+)(?:-(\d+))?")


def expand(nodelist: str) -> tuple[str, ...]:
    """All host names of `nodelist`, in order. LaunchError where it is not a nodelist."""
    hosts: list[str] = []
    for word in _words(nodelist):
        hosts.extend(itertools.islice(_hosts(word, nodelist), _MOST_HOSTS + 1))
        if len(hosts) > _MOST_HOSTS:
            raise _invalid(nodelist, f"it names more than {_MOST_HOSTS} hosts")
    return tuple(hosts)


def _words(nodelist: str) -> Iterator[str]:
    """The parts between commas, but for commas in brackets."""
    at = _skip(nodelist, 0)
    while at < len(nodelist):
        word = _WORD.match(nodelist, at)
        if word is None:
            raise _invalid(nodelist, f"nothing can be made of {nodelist[at:]!r}")
        yield word.group()
        at = _skip(nodelist, word.end())
        if at == word.end() < len(nodelist):
            raise _invalid(nodelist, f"nothing can be made of {nodelist[at:]!r}")


def _hosts(word: str, nodelist: str) -> Iterator[str]:
    pieces = _PIECE.findall(word)
    axes = [list(_numbers(ranges, nodelist)) for ranges, text in pieces if not text]
    if not axes:
        yield word
        return
    if pieces[-1][1]:
        raise _invalid(nodelist, f"{pieces[-1][1]!r} follows a bracket")
    # Slurm counts the last bracket up fastest, and of the others the first.
    order = [*reversed(range(len(axes) - 1)), len(axes) - 1]
    for numbers in itertools.product(*(axes[axis] for axis in order)):
        chosen = iter(number for _, number in sorted(zip(order, numbers, strict=True)))
        yield "".join(text or next(chosen) for _, text in pieces)


def _numbers(ranges: str, nodelist: str) -> Iterator[str]:
    """`03-04,7` → 03, 04, 7: as wide as the first of each range is written."""
    for part in ranges.split(","):
        match = _RANGE.fullmatch(part)
        first, last = (match[1], match[2] or match[1]) if match else ("1", "0")
        count = int(last) - int(first) + 1
        if not 0 < count <= _MOST_HOSTS:
            raise _invalid(nodelist, f"{part!r} is not a range of at most {_MOST_HOSTS} numbers")
        for number in range(int(first), int(last) + 1):
            yield str(number).zfill(len(first))


def _skip(nodelist: str, at: int) -> int:
    match = _SEPARATORS.match(nodelist, at)
    return match.end() if match else at


def _invalid(nodelist: str, why: str) -> LaunchError:
    shown = nodelist if len(nodelist) <= 80 else nodelist[:77] + "..."
    return LaunchError(f"{shown!r} is not a list of nodes as Slurm writes one: {why}")
