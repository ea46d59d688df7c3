"""Prepared data on disk: made once per storage, whole or not there at all.

A directory is named after a fingerprint of all that went into it. It is built beside its place
under a lock and renamed there, so that whoever sees it sees all of it, however many processes on
however many nodes start together. Its `meta.json` gives the size of every file; one that does not
agree is built again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from bigtrain.errors import DataError

logger = logging.getLogger(__name__)

META_FILE = "meta.json"
FORMAT_VERSION = 1
"""Part of every fingerprint: raise it when the same inputs give other arrays."""


def fingerprint(ingredients: Any) -> str:
    """32 hexadecimal digits that change when any of the plain values in `ingredients` does."""
    text = json.dumps([FORMAT_VERSION, ingredients], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def cached(root: Path, key: str, build: Callable[[Path], None], *, title: str) -> Path:
    """The directory `root/key`, made by `build(empty directory)` where it is missing or broken.

    Call it on every process; one of them builds, the others wait.
    """
    target = root / key
    if is_whole(target):
        return target
    try:
        root.mkdir(parents=True, exist_ok=True)
        with _locked(root / f"{key}.lock", title):
            if not is_whole(target):
                _build_into(target, build, title)
    except OSError as error:
        raise DataError(
            f"{title} can't be prepared in {root}: {error}; set data.cache_dir to a folder with "
            "room that every node sees"
        ) from error
    return target


def is_whole(directory: Path) -> bool:
    """True where every file that `meta.json` lists has the size that it lists."""
    try:
        meta = json.loads((directory / META_FILE).read_text())
        sizes = {name: (directory / name).stat().st_size for name in meta["files"]}
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return bool(sizes) and sizes == meta["files"]


class _locked:  # noqa: N801 - reads as a verb where it is used
    """Holds the lock, and says so once where another process holds it first."""

    def __init__(self, path: Path, title: str) -> None:
        self._lock = FileLock(path)
        self._title = title

    def __enter__(self) -> None:
        try:
            self._lock.acquire(timeout=2)
        except Timeout:
            logger.info("waiting for another process that prepares %s", self._title)
            self._lock.acquire(poll_interval=0.2)

    def __exit__(self, *details: object) -> None:
        self._lock.release()


def _build_into(target: Path, build: Callable[[Path], None], title: str) -> None:
    if target.exists():
        logger.warning("%s is not whole; preparing %s again", target, title)
        shutil.rmtree(target)
    # The lock is ours, so whatever else is being built under this key was left by a dead process.
    for stale in target.parent.glob(f".{target.name}.*"):
        shutil.rmtree(stale, ignore_errors=True)
    staging = target.parent / f".{target.name}.{uuid.uuid4().hex[:8]}"
    staging.mkdir()
    try:
        build(staging)
        sizes = {entry.name: entry.stat().st_size for entry in sorted(staging.iterdir())}
        (staging / META_FILE).write_text(json.dumps({"files": sizes, "title": title}, indent=1))
        for entry in staging.iterdir():
            _sync(entry)
        staging.rename(target)
        _sync(target.parent)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
