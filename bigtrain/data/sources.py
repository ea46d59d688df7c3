"""Documents, one string at a time, from wherever the `data` section points.

Only the one process that prepares the data reads them, so nothing here is sharded. A source can
name itself without being read: its `identity` is part of the prepared data's fingerprint.
"""

from __future__ import annotations

import sys
import sysconfig
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from bigtrain.data.files import OPENERS, format_of, matching
from bigtrain.data.settings import DataSettings
from bigtrain.errors import ConfigError, DataError

_PIECE_CHARACTERS = 4 << 20


@dataclass(frozen=True, kw_only=True)
class Document:
    """A text, or a piece of one that is too long to hold; `ends` says that nothing follows."""

    text: str
    ends: bool = True


class Source(Protocol):
    """Documents that can be named before they are read."""

    def identity(self) -> Any:
        """Plain values that change when the documents do."""
        ...

    def documents(self) -> Iterator[Document]:
        """Every document, in an order that is always the same."""
        ...


def training_source(settings: DataSettings, *, root: Path) -> Source:
    """What to train on. Relative paths are looked for under `root`."""
    if settings.train_files:
        return _file_source(settings.train_files, "data.train_files", settings, root)
    name = str(settings.name)
    if name.startswith("builtin:"):
        return BuiltinSource(name=name)
    return HubSource(
        name=name,
        config_name=settings.config_name,
        split="train",
        text_field=settings.text_field,
    )


def evaluation_source(settings: DataSettings, *, root: Path) -> Source | None:
    """What to evaluate on, where it is apart from the training data; else None."""
    if settings.eval_files:
        return _file_source(settings.eval_files, "data.eval_files", settings, root)
    if not isinstance(settings.eval_split, str):
        return None
    name = str(settings.name)
    if name.startswith("builtin:"):
        raise ConfigError(
            f"data.eval_split is {settings.eval_split!r}, but {name} has no named splits; "
            "give a share such as 0.05"
        )
    return HubSource(
        name=name,
        config_name=settings.config_name,
        split=settings.eval_split,
        text_field=settings.text_field,
    )


@dataclass(frozen=True, kw_only=True)
class BuiltinSource:
    """Text that comes with every Python: its manual's prose, or its library's source."""

    name: str

    def __post_init__(self) -> None:
        if self.name not in BUILTINS:
            raise ConfigError(f"data.name is {self.name!r}; built in are {', '.join(BUILTINS)}")

    def identity(self) -> Any:
        return [self.name, sys.version]

    def documents(self) -> Iterator[Document]:
        for text in BUILTINS[self.name]():
            yield Document(text=text)


def _python_docs() -> Iterator[str]:
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise DataError(
            "builtin:python-docs needs Python's module pydoc_data, which this interpreter lacks "
            f"({sys.executable}); on Debian it is in libpython3-stdlib"
        ) from error
    for name in sorted(topics):
        yield topics[name]


def _python_source() -> Iterator[str]:
    library = Path(sysconfig.get_paths()["stdlib"])
    apart = {"site-packages", "dist-packages", "test", "tests", "idle_test"}
    for path in sorted(library.rglob("*.py")):
        if not apart.intersection(path.relative_to(library).parts):
            yield path.read_text(encoding="utf-8", errors="replace")


BUILTINS: Mapping[str, Callable[[], Iterator[str]]] = {
    "builtin:python-docs": _python_docs,
    "builtin:python-source": _python_source,
}


@dataclass(frozen=True, kw_only=True)
class FileSource:
    """Documents in files of one format, file after file."""

    files: tuple[Path, ...]
    format: str | None
    text_field: str
    by_line: bool
    """A text file's every line is a document, rather than the whole file."""

    def identity(self) -> Any:
        stats = [(path, path.stat()) for path in self.files]
        files = [[str(path.resolve()), stat.st_size, stat.st_mtime_ns] for path, stat in stats]
        return [files, self.format, self.text_field, self.by_line]

    def documents(self) -> Iterator[Document]:
        for path in self.files:
            kind = self.format or format_of(path)
            try:
                if kind == "text":
                    yield from _text_documents(path, by_line=self.by_line)
                else:
                    yield from _rows(
                        _stream(kind, data_files=str(path), split="train"),
                        text_field=self.text_field,
                        where=str(path),
                    )
            # pyarrow's errors are ValueErrors, `datasets`' are RuntimeErrors or ValueErrors.
            except (OSError, EOFError, ValueError, RuntimeError, KeyError) as error:
                raise DataError(
                    f"{path} can't be read as {kind}: {type(error).__name__}: {error}"
                ) from error


@dataclass(frozen=True, kw_only=True)
class HubSource:
    """One split of a dataset of the hub, or of a folder that `datasets` can load, streamed."""

    name: str
    config_name: str | None
    split: str
    text_field: str

    def identity(self) -> Any:
        return [self.name, self.config_name, self.split, self.text_field, _contents(self.name)]

    def documents(self) -> Iterator[Document]:
        where = f"dataset {self.name} (split {self.split})"
        try:
            rows = _stream(self.name, name=self.config_name, split=self.split)
            yield from _rows(rows, text_field=self.text_field, where=where)
        except (OSError, ValueError, RuntimeError, KeyError) as error:
            raise DataError(
                f"{where} can't be read: {type(error).__name__}: {error}. Check data.name, "
                "data.config_name and the network, or give local files as data.train_files"
            ) from error


def _contents(name: str) -> list[Any]:
    """Of a folder: where it is, and its files with sizes and times; of a name on a hub: nothing."""
    folder = Path(name)
    if not folder.is_dir():
        return []
    stats = sorted((path, path.stat()) for path in folder.rglob("*") if path.is_file())
    files = [[str(path), stat.st_size, stat.st_mtime_ns] for path, stat in stats]
    return [str(folder.resolve()), files]


def _file_source(
    patterns: tuple[str, ...], key: str, settings: DataSettings, root: Path
) -> FileSource:
    try:
        files = [path for pattern in patterns for path in matching(pattern, root)]
    except DataError as error:
        raise DataError(f"{key}: {error}") from error
    if settings.format is None:
        for path in files:
            format_of(path)
    return FileSource(
        files=tuple(dict.fromkeys(files)),
        format=settings.format,
        text_field=settings.text_field,
        by_line=not settings.packing,
    )


def _text_documents(path: Path, *, by_line: bool) -> Iterator[Document]:
    opener = OPENERS.get(path.suffix.lower(), open)
    with opener(path, "rt", encoding="utf-8", newline="") as file:
        if by_line:
            for line in file:
                if line.strip():
                    yield Document(text=line.rstrip("\r\n"))
            return
        # Pieces end at a line's end, where hardly any tokenizer joins two tokens.
        while True:
            piece = file.read(_PIECE_CHARACTERS)
            if len(piece) < _PIECE_CHARACTERS:
                yield Document(text=piece)
                return
            yield Document(text=piece + file.readline(_PIECE_CHARACTERS), ends=False)


def _stream(path: str, **options: Any) -> Any:
    import datasets

    datasets.disable_progress_bars()
    return datasets.load_dataset(path, streaming=True, **options)


def _rows(rows: Any, *, text_field: str, where: str) -> Iterator[Document]:
    """The text column of every row; a missing column or another type is the user's to mend."""
    for number, row in enumerate(rows):
        if text_field not in row:
            raise DataError(
                f"{where} has no column {text_field!r}; it has {', '.join(sorted(row))}. "
                "Set data.text_field"
            )
        text = row[text_field]
        if text is None:
            continue
        if not isinstance(text, str):
            raise DataError(
                f"{where}: row {number}, column {text_field!r} holds {type(text).__name__}, "
                "not text. Set data.text_field"
            )
        yield Document(text=text)
