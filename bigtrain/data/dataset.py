"""Prepared data as torch datasets: rows of a memory-mapped file, and nothing in memory.

The file is opened in the process that reads it, so that a dataset costs a DataLoader's worker or
a pickle its path alone.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from bigtrain.data.packing import ENDS_FILE, TOKENS_FILE

Sample = dict[str, Tensor]
_IGNORED_LABEL = -100


class PackedDataset(Dataset[Sample]):
    """Samples {input_ids, labels}: int64 [sequence_length], rows [start, stop) of the file."""

    def __init__(self, directory: Path, *, start: int = 0, stop: int | None = None) -> None:
        self.directory = directory
        self._tokens = _map(directory / TOKENS_FILE)
        self._start = start
        self._stop = len(self._tokens) if stop is None else stop

    @property
    def sequence_length(self) -> int:
        return int(self._tokens.shape[1])

    def __len__(self) -> int:
        return self._stop - self._start

    def __getitem__(self, index: int) -> Sample:
        row = self._tokens[self._start + _within(index, len(self))]
        return _sample(row)

    def __reduce__(self) -> tuple[Any, ...]:
        return _open_packed, (self.directory, self._start, self._stop)


class DocumentDataset(Dataset[Sample]):
    """Samples {input_ids, labels}: int64 [tokens of that document], documents [start, stop)."""

    def __init__(self, directory: Path, *, start: int = 0, stop: int | None = None) -> None:
        self.directory = directory
        self._tokens = _map(directory / TOKENS_FILE)
        self._ends = _map(directory / ENDS_FILE)
        self._start = start
        self._stop = len(self._ends) if stop is None else stop

    def __len__(self) -> int:
        return self._stop - self._start

    def __getitem__(self, index: int) -> Sample:
        place = self._start + _within(index, len(self))
        begin = int(self._ends[place - 1]) if place else 0
        return _sample(self._tokens[begin : int(self._ends[place])])

    def __reduce__(self) -> tuple[Any, ...]:
        return _open_documents, (self.directory, self._start, self._stop)


class PadBatch:
    """Collates samples of different lengths: padded on the right, with labels that don't count."""

    def __init__(self, pad_token_id: int) -> None:
        self.pad_token_id = pad_token_id

    def __call__(self, samples: list[Sample]) -> dict[str, Tensor]:
        tokens = [sample["input_ids"] for sample in samples]
        labels = [sample["labels"] for sample in samples]
        ones = [torch.ones_like(row) for row in tokens]
        return {
            "input_ids": _stack(tokens, self.pad_token_id),
            "attention_mask": _stack(ones, 0),
            "labels": _stack(labels, _IGNORED_LABEL),
        }


def _stack(rows: list[Tensor], padding: int) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=padding)


def _open_packed(directory: Path, start: int, stop: int) -> PackedDataset:
    return PackedDataset(directory, start=start, stop=stop)


def _open_documents(directory: Path, start: int, stop: int) -> DocumentDataset:
    return DocumentDataset(directory, start=start, stop=stop)


def _map(path: Path) -> np.ndarray[Any, Any]:
    array: np.ndarray[Any, Any] = np.load(path, mmap_mode="r", allow_pickle=False)
    return array


def _within(index: int, length: int) -> int:
    if not -length <= index < length:
        raise IndexError(f"sample {index} of {length}")
    return index % length


def _sample(row: np.ndarray[Any, Any]) -> Sample:
    tokens = torch.from_numpy(row.astype(np.int64))
    return {"input_ids": tokens, "labels": tokens}
