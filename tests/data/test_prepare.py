from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from bigtrain.data import cache, packing
from bigtrain.data.dataset import PadBatch
from bigtrain.data.packing import ArrayWriter, token_dtype
from bigtrain.data.prepare import PreparedData, prepare
from bigtrain.errors import DataError


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    lines = [{"text": f"document {number} " + "x" * (number % 7)} for number in range(100)]
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def prepared(tmp_path: Path, tokenizer: object, **section: object) -> PreparedData:
    section = {"train_files": "corpus.jsonl", "sequence_length": 16, **section}
    return prepare(section, tokenizer, cache_root=tmp_path / "cache", root=tmp_path)


def test_packed_sequences_are_the_documents_one_after_another(
    tmp_path: Path, corpus: Path, byte_tokenizer, monkeypatch
) -> None:
    monkeypatch.setattr(packing, "_FLUSH_TOKENS", 50)
    monkeypatch.setattr(packing, "_BATCH_CHARACTERS", 30)
    expected = "".join(
        json.loads(line)["text"] + "<|endoftext|>" for line in corpus.read_text().splitlines()
    )

    data = prepared(tmp_path, byte_tokenizer)

    tokens = torch.cat([sample["input_ids"] for sample in data.train])
    whole = byte_tokenizer(expected)["input_ids"]
    assert tokens.tolist() == whole[: len(whole) // 16 * 16]
    assert data.train[0]["input_ids"].dtype == torch.int64
    assert data.train[-1]["labels"].tolist() == data.train[-1]["input_ids"].tolist()
    assert data.evaluation is None


def test_documents_longer_than_the_flush_are_not_cut(tmp_path: Path, byte_tokenizer) -> None:
    (tmp_path / "a.txt").write_text("abc\n" * 1000)

    data = prepared(tmp_path, byte_tokenizer, train_files="a.txt", sequence_length=1000)

    assert len(data.train) == 4
    assert data.train.sequence_length == 1000


def test_a_share_for_evaluation_is_the_end_of_the_data(
    tmp_path: Path, corpus: Path, byte_tokenizer
) -> None:
    whole = prepared(tmp_path, byte_tokenizer).train
    data = prepared(tmp_path, byte_tokenizer, eval_split=0.1)

    assert data.evaluation is not None
    assert len(data.evaluation) == -(-len(whole) // 10)
    assert len(data.train) + len(data.evaluation) == len(whole)
    assert data.evaluation[-1]["input_ids"].tolist() == whole[-1]["input_ids"].tolist()
    with pytest.raises(IndexError):
        data.train[len(data.train)]


def test_unpacked_documents_keep_their_length_and_are_padded_by_the_collator(
    tmp_path: Path, corpus: Path, byte_tokenizer
) -> None:
    data = prepared(tmp_path, byte_tokenizer, packing=False, eval_split=0.2)

    assert len(data.train) == 80
    assert [len(data.train[i]["input_ids"]) for i in (0, 1, 5)] == [12, 13, 16]
    batch = PadBatch(pad_token_id=7)([data.train[0], data.train[5]])
    assert batch["input_ids"].shape == (2, 16)
    assert batch["input_ids"][0, 12:].tolist() == [7] * 4
    assert batch["labels"][0, 12:].tolist() == [-100] * 4
    assert batch["attention_mask"].sum(1).tolist() == [12, 16]


def test_max_samples_counts_documents(tmp_path: Path, corpus: Path, byte_tokenizer) -> None:
    data = prepared(tmp_path, byte_tokenizer, packing=False, max_samples=3)

    assert len(data.train) == 3


def test_evaluation_files_are_prepared_apart(tmp_path: Path, corpus: Path, byte_tokenizer) -> None:
    (tmp_path / "eval.txt").write_text("evaluate on this, please, not on that")

    data = prepared(tmp_path, byte_tokenizer, eval_files=["eval.txt"])

    assert data.evaluation is not None
    assert byte_tokenizer.decode(data.evaluation[0]["input_ids"]) == "evaluate on this"


def test_too_little_text_is_said(tmp_path: Path, corpus: Path, byte_tokenizer) -> None:
    with pytest.raises(DataError, match="fills not one sequence of 100000 tokens"):
        prepared(tmp_path, byte_tokenizer, sequence_length=100_000)
    with pytest.raises(DataError, match="leaves none to train on"):
        prepared(tmp_path, byte_tokenizer, sequence_length=1000, eval_split=0.9)


def test_a_dataset_pickles_as_its_path(tmp_path: Path, corpus: Path, byte_tokenizer) -> None:
    data = prepared(tmp_path, byte_tokenizer, eval_split=0.1)
    flat = prepared(tmp_path, byte_tokenizer, packing=False)

    for dataset in (data.train, data.evaluation, flat.train):
        pickled = pickle.dumps(dataset)
        assert len(pickled) < 500
        again = pickle.loads(pickled)
        assert len(again) == len(dataset)
        assert again[3]["input_ids"].tolist() == dataset[3]["input_ids"].tolist()


def test_the_second_time_nothing_is_read(
    tmp_path: Path, corpus: Path, byte_tokenizer, monkeypatch
) -> None:
    first = prepared(tmp_path, byte_tokenizer).train.directory
    monkeypatch.setattr(packing, "tokenised", lambda *_: pytest.fail("tokenised again"))

    assert prepared(tmp_path, byte_tokenizer).train.directory == first


@pytest.mark.parametrize("change", ["content", "sequence_length", "tokenizer", "text_field"])
def test_whatever_changes_the_tokens_changes_the_fingerprint(
    tmp_path: Path, corpus: Path, byte_tokenizer, change: str
) -> None:
    first = prepared(tmp_path, byte_tokenizer).train.directory
    section: dict[str, object] = {}
    if change == "content":
        corpus.write_text(corpus.read_text().replace("document 1 ", "monument 1 "))
    elif change == "sequence_length":
        section["sequence_length"] = 17
    elif change == "tokenizer":
        byte_tokenizer.add_tokens(["document"])
    else:
        corpus.write_text(corpus.read_text().replace('"text"', '"body"'))
        section["text_field"] = "body"

    assert prepared(tmp_path, byte_tokenizer, **section).train.directory != first


@pytest.mark.parametrize("damage", ["truncated", "no meta", "meta of another kind", "missing"])
def test_what_is_broken_is_built_again(
    tmp_path: Path, corpus: Path, byte_tokenizer, damage: str
) -> None:
    first = prepared(tmp_path, byte_tokenizer).train
    expected = first[-1]["input_ids"].tolist()
    tokens, meta = (first.directory / name for name in (packing.TOKENS_FILE, cache.META_FILE))
    if damage == "truncated":
        os.truncate(tokens, 300)
    elif damage == "no meta":
        meta.unlink()
    elif damage == "meta of another kind":
        meta.write_text('{"files": []}')
    else:
        tokens.unlink()

    again = prepared(tmp_path, byte_tokenizer).train

    assert again[-1]["input_ids"].tolist() == expected


def test_a_failed_build_leaves_nothing(tmp_path: Path) -> None:
    def fail(directory: Path) -> None:
        (directory / "half").write_text("written")
        raise DataError("no more")

    with pytest.raises(DataError, match="no more"):
        cache.cached(tmp_path, "key", fail, title="it")

    assert [entry.name for entry in tmp_path.iterdir() if entry.is_dir()] == []


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")

    with pytest.raises(DataError, match="set data.cache_dir"):
        cache.cached(tmp_path / "file" / "cache", "key", lambda _: None, title="it")


def _build_once(root: Path, counter: Path) -> None:
    def build(directory: Path) -> None:
        with counter.open("a") as file:
            file.write("built\n")
        time.sleep(0.3)
        (directory / "data").write_text("x")

    assert (cache.cached(root, "key", build, title="it") / "data").read_text() == "x"


def test_processes_that_start_together_build_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    counter = tmp_path / "counter"
    processes = [
        context.Process(target=_build_once, args=(tmp_path / "root", counter)) for _ in range(6)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)

    assert [process.exitcode for process in processes] == [0] * 6
    assert counter.read_text() == "built\n"


def test_an_array_written_bit_by_bit_is_what_numpy_reads(tmp_path: Path) -> None:
    rows = np.arange(120_000).reshape(-1, 3)
    path = tmp_path / "a.npy"

    with ArrayWriter(path, dtype=token_dtype(200_000), row_shape=(3,)) as writer:
        for start in range(0, len(rows), 777):
            writer.append(rows[start : start + 777])

    assert np.array_equal(np.load(path, mmap_mode="r"), rows)
    assert np.load(path).dtype == np.uint32
