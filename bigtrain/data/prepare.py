"""From the `data` section to datasets that every rank maps.

Called on every rank before the process group is joined: whoever comes first on a storage does the
work, the others wait for its lock, and nobody waits inside a collective.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bigtrain.data.cache import cached, fingerprint
from bigtrain.data.dataset import DocumentDataset, PackedDataset
from bigtrain.data.packing import end_of_text, lay_out, pack
from bigtrain.data.settings import DataSettings
from bigtrain.data.sources import Document, Source, evaluation_source, training_source
from bigtrain.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PreparedDataset = PackedDataset | DocumentDataset


@dataclass(frozen=True, kw_only=True)
class PreparedData:
    """What to train on, and what to evaluate on where the section says so."""

    train: PreparedDataset
    evaluation: PreparedDataset | None
    packed: bool


def prepare(
    section: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    *,
    cache_root: Path,
    root: Path,
) -> PreparedData:
    """The datasets of a plan's `data` section; its relative paths are taken from `root`.

    Raises `ConfigError` for what the section says, `DataError` for what is found there.
    """
    settings = DataSettings.from_section(section)
    source = training_source(settings, root=root)
    apart = evaluation_source(settings, root=root)
    train_dir = _prepared(source, "the training data", settings, tokenizer, cache_root)
    if apart is not None:
        evaluation_dir = _prepared(apart, "the evaluation data", settings, tokenizer, cache_root)
        return PreparedData(
            train=_open(train_dir, settings),
            evaluation=_open(evaluation_dir, settings),
            packed=settings.packing,
        )
    if isinstance(settings.eval_split, float):
        return _split(train_dir, settings, settings.eval_split)
    return PreparedData(train=_open(train_dir, settings), evaluation=None, packed=settings.packing)


def tokenizer_identity(tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash of all that decides which tokens a text becomes."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    text = backend.to_str() if backend is not None else repr(sorted(tokenizer.get_vocab().items()))
    return hashlib.sha256(f"{type(tokenizer).__name__}\n{text}".encode()).hexdigest()


def _prepared(
    source: Source,
    title: str,
    settings: DataSettings,
    tokenizer: PreTrainedTokenizerBase,
    cache_root: Path,
) -> Path:
    key = fingerprint(
        {
            "source": source.identity(),
            "tokenizer": tokenizer_identity(tokenizer),
            "end": end_of_text(tokenizer),
            "sequence_length": settings.sequence_length,
            "packing": settings.packing,
            "max_samples": settings.max_samples,
        }
    )
    write = pack if settings.packing else lay_out

    def build(directory: Path) -> None:
        documents = _first(source.documents(), settings.max_samples)
        write(documents, tokenizer, directory, sequence_length=settings.sequence_length)

    return cached(cache_root, key, build, title=title)


def _first(documents: Iterator[Document], count: int | None) -> Iterator[Document]:
    """The first `count` documents, which may come in pieces; all of them without a count."""
    ended = 0
    for document in documents:
        if count is not None and ended >= count:
            return
        yield document
        ended += document.ends


def _split(directory: Path, settings: DataSettings, share: float) -> PreparedData:
    """The last `share` of the sequences is for evaluation, so that training never sees it."""
    total = len(_open(directory, settings))
    held_out = math.ceil(total * share)
    if held_out >= total:
        raise DataError(
            f"data.eval_split {share} of {total} sequences leaves none to train on; "
            "give more text, or a smaller data.sequence_length"
        )
    return PreparedData(
        train=_open(directory, settings, stop=total - held_out),
        evaluation=_open(directory, settings, start=total - held_out),
        packed=settings.packing,
    )


def _open(
    directory: Path, settings: DataSettings, *, start: int = 0, stop: int | None = None
) -> PreparedDataset:
    kind = PackedDataset if settings.packing else DocumentDataset
    return kind(directory, start=start, stop=stop)
