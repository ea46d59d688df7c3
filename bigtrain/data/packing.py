"""Documents → tokens → arrays on disk, in one pass and in bounded memory.

Packed data is one `.npy` of shape [sequences, sequence_length]: documents one after another, each
followed by end-of-text, the last partial sequence dropped. Unpacked data is one flat `.npy` of
tokens and one of the position at which each document ends.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
from numpy.lib import format as npy

from bigtrain.data.sources import Document
from bigtrain.errors import ConfigError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

TOKENS_FILE = "tokens.npy"
ENDS_FILE = "ends.npy"
_BATCH_CHARACTERS = 1 << 20
_FLUSH_TOKENS = 1 << 20
_REPORT_EVERY_S = 10.0


def token_dtype(vocabulary_size: int) -> np.dtype[Any]:
    """The narrowest type that holds every token's number."""
    return np.dtype(np.uint16 if vocabulary_size <= 1 << 16 else np.uint32)


class ArrayWriter:
    """Appends rows to a `.npy` file whose length is not known before its end.

    numpy leaves room in the header for the first axis to grow, so the final header, written on
    leaving, is as long as the first.
    """

    def __init__(self, path: Path, *, dtype: np.dtype[Any], row_shape: tuple[int, ...] = ()):
        self.path = path
        self.rows = 0
        self._dtype = dtype
        self._row_shape = row_shape
        self._file: BinaryIO = path.open("wb")
        self._write_header()
        self._data_start = self._file.tell()

    def append(self, rows: np.ndarray[Any, Any]) -> None:
        """Add `rows`, of shape [any number, *row_shape]."""
        rows.astype(self._dtype, copy=False).tofile(self._file)
        self.rows += len(rows)

    def __enter__(self) -> ArrayWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        with self._file:
            self._file.seek(0)
            self._write_header()
            if self._file.tell() != self._data_start:
                raise AssertionError(f"the header of {self.path} has grown over its data")

    def _write_header(self) -> None:
        npy.write_array_header_2_0(
            self._file,
            {
                "shape": (self.rows, *self._row_shape),
                "fortran_order": False,
                "descr": npy.dtype_to_descr(self._dtype),
            },
        )


def end_of_text(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that is put after each document."""
    for token in (tokenizer.eos_token_id, tokenizer.sep_token_id):
        if token is not None:
            return int(token)
    raise ConfigError(
        f"the tokenizer {tokenizer.name_or_path!r} has no end-of-text token to put between "
        "documents; choose one that has an eos_token"
    )


def pack(
    documents: Iterable[Document],
    tokenizer: PreTrainedTokenizerBase,
    directory: Path,
    *,
    sequence_length: int,
) -> None:
    """Write full sequences of `documents` to `directory`."""
    held: list[np.ndarray[Any, Any]] = []
    held_tokens = 0
    with ArrayWriter(
        directory / TOKENS_FILE, dtype=token_dtype(len(tokenizer)), row_shape=(sequence_length,)
    ) as writer:
        for tokens, _ in tokenised(documents, tokenizer):
            held.append(tokens)
            held_tokens += len(tokens)
            if held_tokens >= max(_FLUSH_TOKENS, sequence_length):
                held = [_append_sequences(writer, np.concatenate(held), sequence_length)]
                held_tokens = len(held[0])
        if held:
            _append_sequences(writer, np.concatenate(held), sequence_length)
        if not writer.rows:
            raise DataError(
                f"the data fills not one sequence of {sequence_length} tokens; "
                "give more text, or a smaller data.sequence_length"
            )


def lay_out(
    documents: Iterable[Document],
    tokenizer: PreTrainedTokenizerBase,
    directory: Path,
    *,
    sequence_length: int,
) -> None:
    """Write one sequence for each document to `directory`, cut off at `sequence_length`."""
    end = 0
    with (
        ArrayWriter(directory / TOKENS_FILE, dtype=token_dtype(len(tokenizer))) as tokens_writer,
        ArrayWriter(directory / ENDS_FILE, dtype=np.dtype(np.int64)) as ends_writer,
    ):
        length = 0
        for tokens, ends in tokenised(documents, tokenizer):
            kept = tokens[: sequence_length - length]
            tokens_writer.append(kept)
            length += len(kept)
            if ends:
                end += length
                length = 0
                ends_writer.append(np.array([end]))
        if not ends_writer.rows:
            raise DataError("the data holds no document")


def tokenised(
    documents: Iterable[Document], tokenizer: PreTrainedTokenizerBase
) -> Iterator[tuple[np.ndarray[Any, Any], bool]]:
    """Tokens of each document or piece, and whether it ends there; then end-of-text follows."""
    end = end_of_text(tokenizer)
    dtype = token_dtype(len(tokenizer))
    progress = _Progress()
    for batch in _batches(documents):
        encoded = tokenizer(
            [document.text for document in batch],
            add_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,  # "longer than the model's maximum": they are cut below
        )["input_ids"]
        for document, tokens in zip(batch, encoded, strict=True):
            progress.count(document, len(tokens))
            yield np.array([*tokens, end] if document.ends else tokens, dtype), document.ends
    progress.report()


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Documents of about a million characters together: enough to keep a tokenizer busy."""
    batch: list[Document] = []
    characters = 0
    for document in documents:
        batch.append(document)
        characters += len(document.text)
        if characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _append_sequences(
    writer: ArrayWriter, tokens: np.ndarray[Any, Any], sequence_length: int
) -> np.ndarray[Any, Any]:
    """Append all full sequences; returns the tokens that are left."""
    full = len(tokens) // sequence_length * sequence_length
    writer.append(tokens[:full].reshape(-1, sequence_length))
    return tokens[full:]


class _Progress:
    """Says now and then how far tokenising has come."""

    def __init__(self) -> None:
        self._started = self._reported = time.monotonic()
        self._documents = 0
        self._tokens = 0

    def count(self, document: Document, tokens: int) -> None:
        self._documents += document.ends
        self._tokens += tokens
        if time.monotonic() - self._reported > _REPORT_EVERY_S:
            self.report()

    def report(self) -> None:
        self._reported = time.monotonic()
        rate = self._tokens / max(1e-9, self._reported - self._started)
        logger.info(
            "tokenised %s, %s tokens (%s tokens/s)",
            f"{self._documents:,} document{'s' * (self._documents != 1)}",
            f"{self._tokens:,}",
            f"{rate:,.0f}",
        )
