from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from bigtrain.data import sources
from bigtrain.data.settings import DataSettings
from bigtrain.data.sources import HubSource, evaluation_source, training_source
from bigtrain.errors import ConfigError, DataError


def texts(root: Path, **settings: object) -> list[str]:
    fields = {"sequence_length": 8, **settings}
    source = training_source(DataSettings.from_section(fields), root=root)
    return [document.text for document in source.documents()]


def test_every_format_gives_the_same_documents(tmp_path: Path) -> None:
    import pandas

    rows = [{"text": "one", "n": 1}, {"text": "two\nlines", "n": 2}]
    frame = pandas.DataFrame(rows)
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with gzip.open(tmp_path / "b.jsonl.gz", "wt") as file:
        file.write((tmp_path / "a.jsonl").read_text())
    frame.to_parquet(tmp_path / "a.parquet")
    frame.to_csv(tmp_path / "a.csv", index=False)

    for name in ("a.jsonl", "b.jsonl.gz", "a.parquet", "a.csv"):
        assert texts(tmp_path, train_files=name) == ["one", "two\nlines"], name


def test_a_text_file_is_one_document_and_without_packing_one_for_each_line(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\n\ntwo\n")

    assert texts(tmp_path, train_files=["a.txt"]) == ["one\n\ntwo\n"]
    assert texts(tmp_path, train_files=["a.txt"], packing=False) == ["one", "two"]


def test_a_long_text_comes_in_pieces_that_end_with_a_line(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(sources, "_PIECE_CHARACTERS", 10)
    text = "first line\nsecond\nthird line, longer\n"
    (tmp_path / "a.txt").write_text(text)
    settings = DataSettings(sequence_length=8, train_files=("a.txt",))

    pieces = list(training_source(settings, root=tmp_path).documents())

    assert "".join(piece.text for piece in pieces) == text
    assert [piece.ends for piece in pieces] == [False] * (len(pieces) - 1) + [True]
    assert pieces[0].text == "first line\n"


def test_globs_are_sorted_and_a_name_with_brackets_is_taken_as_it_stands(tmp_path: Path) -> None:
    for name in ("b.txt", "a.txt", "[c].txt"):
        (tmp_path / name).write_text(name)

    assert texts(tmp_path, train_files=["[c].txt", "?.txt"]) == ["[c].txt", "a.txt", "b.txt"]


def test_builtin_text_is_real_and_long(tmp_path: Path) -> None:
    prose = texts(tmp_path, name="builtin:python-docs")
    assert sum(map(len, prose)) > 400_000

    source = training_source(
        DataSettings(sequence_length=8, name="builtin:python-source"), root=tmp_path
    )
    first = next(iter(source.documents()))
    assert "import" in first.text


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"train_files": "corpsu.txt"}, DataError, "there is corpus.txt"),
        (
            {"train_files": "no/such/a.txt"},
            DataError,
            "; relative paths start in",
        ),
        (
            {"train_files": "corpus.bin"},
            ConfigError,
            "set data.format to one of csv, json, parquet, text",
        ),
        ({"name": "builtin:poems"}, ConfigError, "built in are builtin:python-docs"),
        ({"train_files": "t.jsonl", "text_field": "body"}, DataError, "it has n, text"),
        ({"train_files": "t.jsonl", "text_field": "n"}, DataError, "holds int, not text"),
        ({"train_files": "broken.jsonl"}, DataError, "broken.jsonl can't be read as json"),
        ({"train_files": "broken.parquet"}, DataError, "can't be read as parquet"),
        ({"train_files": "latin.txt"}, DataError, "latin.txt can't be read as text"),
        ({"train_files": "cut.txt.gz"}, DataError, "cut.txt.gz can't be read as text"),
    ],
)
def test_what_is_wrong_is_named_with_its_mending(
    tmp_path: Path, settings: dict[str, object], error: type[Exception], message: str
) -> None:
    (tmp_path / "corpus.txt").write_text("text")
    (tmp_path / "corpus.bin").write_text("text")
    (tmp_path / "t.jsonl").write_text('{"text": "a", "n": 1}\n')
    (tmp_path / "broken.jsonl").write_text('{"text": "a"}\n{"text": \n')
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 no")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "cut.txt.gz").write_bytes(gzip.compress(b"text" * 100)[:-9])

    with pytest.raises(error) as raised:
        texts(tmp_path, **settings)

    assert message in str(raised.value)


def test_a_builtin_has_no_named_splits(tmp_path: Path) -> None:
    settings = DataSettings(sequence_length=8, name="builtin:python-docs", eval_split="validation")

    with pytest.raises(ConfigError, match="no named splits"):
        evaluation_source(settings, root=tmp_path)


def test_folders_of_the_same_name_are_not_taken_for_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = set()
    for place in ("one", "other"):
        (tmp_path / place / "corpus").mkdir(parents=True)
        monkeypatch.chdir(tmp_path / place)
        source = HubSource(name="corpus", config_name=None, split="train", text_field="text")
        seen.add(repr(source.identity()))
        Path("corpus/a.txt").write_text(place)
        seen.add(repr(source.identity()))
    assert len(seen) == 4
