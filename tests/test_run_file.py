"""A run file is read as plain YAML 1.2, and a hostile one ends in one message."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bigtrain.errors import ConfigError
from bigtrain.run_file import parse_run_file, parse_value, read_run_file


def _fault(text: str) -> str:
    with pytest.raises(ConfigError) as raised:
        parse_run_file(text, label="run.yaml")
    return str(raised.value)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("no", "no"),
        ("true", True),
        ("False", False),
        ("1e-4", 1e-4),
        ("-3E5", -3e5),
        (".5", 0.5),
        ("2_000", 2000),
        ("0x10", 16),
        ("007", "007"),
        ("1:30", "1:30"),
        ("2024-01-01", "2024-01-01"),
        ("~", None),
        ("", None),
        ("'1e-4'", "1e-4"),
        ("[a, 1]", ["a", 1]),
        ("{a: 1}", {"a": 1}),
    ],
)
def test_scalars_are_those_of_yaml_1_2(text: str, value: Any) -> None:
    assert parse_value(text, label="--set x") == value


def test_every_key_knows_its_line() -> None:
    file = parse_run_file("a:\n  b: 1\n\n  c: {d: 2}\n", label="run.yaml")

    assert file.values == {"a": {"b": 1, "c": {"d": 2}}}
    assert file.lines == {("a",): 1, ("a", "b"): 2, ("a", "c"): 4, ("a", "c", "d"): 4}


def test_an_empty_file_says_nothing() -> None:
    assert parse_run_file("", label="run.yaml").values == {}


def test_words_that_could_be_a_truth_are_refused_where_nobody_knows() -> None:
    file = parse_run_file(
        "training: {bf16: yes}\nmodel: {config: {tie: yes, quoted: 'no'}}\n", label="run.yaml"
    )

    assert file.values["training"] == {"bf16": "yes"}
    assert file.faults == (
        "run.yaml:2: model.config.tie: yes could be true, false or text; write true, false or "
        "quotes",
    )


def test_what_can_be_read_is_read_and_what_can_not_is_told_together() -> None:
    file = parse_run_file(
        "a: 1\na: 2\nb: !!python/object/apply:os.system [ls]\n? [c]\n: 3\nd: 1e999\n",
        label="run.yaml",
    )

    assert file.faults == (
        "run.yaml:2: a: said twice (first on line 1); keep one",
        "run.yaml:3: b: the tag tag:yaml.org,2002:python/object/apply:os.system is not allowed; "
        "write a plain value",
        "run.yaml:4: the file: a key must be a plain word",
        "run.yaml:6: d: 1e999 is not a finite number",
    )


def _bomb() -> str:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    for i in range(1, 9):
        inner = ", ".join([f"*a{i - 1}"] * 10)
        lines.append(f"a{i}: &a{i} [{inner}]")
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "a: [",
            "run.yaml:1: not YAML: expected the node content, but found '<stream end>'",
        ),
        ("a: b: c", "run.yaml:1: not YAML: mapping values are not allowed here"),
        ("a: 1\n---\nb: 2\n", "run.yaml:2: not YAML: but found another document"),
        ("a: *nowhere", "run.yaml:1: not YAML: found undefined alias 'nowhere'"),
        (
            "- a\n- b\n",
            "run.yaml:1: a run file holds sections (model, data, training, …), and this holds a "
            "list",
        ),
        (
            "just words",
            "run.yaml:1: a run file holds sections (model, data, training, …), and this holds a "
            "str",
        ),
        ("a: &a [*a]", "run.yaml: too many or too deeply nested values"),
        (_bomb(), "run.yaml: too many or too deeply nested values"),
        ("[" * 5000, "run.yaml: nested too deeply to be a run file"),
        (
            "a: \0",
            "run.yaml: not a YAML file: unacceptable character #x0000: special characters are not "
            'allowed in "<unicode string>", position 3',
        ),
    ],
)
def test_a_hostile_file_ends_in_one_message(text: str, message: str) -> None:
    assert _fault(text) == message


def test_a_number_of_ten_thousand_digits_is_one_message() -> None:
    assert _fault("a: " + "9" * 10_000).startswith("run.yaml: not a YAML file: Exceeds the limit")


def test_files_that_are_no_text_or_too_large_or_not_there_are_named(tmp_path: Path) -> None:
    binary, large = tmp_path / "binary.yaml", tmp_path / "large.yaml"
    binary.write_bytes(b"\xff\xfe\x00")
    large.write_text("a: " + "x" * (1 << 20))
    expected = {
        binary: "run.yaml: not text in UTF-8",
        large: "run.yaml: too large (over 1048576 bytes)",
        tmp_path / "nowhere.yaml": "run.yaml: can't be read: No such file or directory",
        tmp_path: "run.yaml: can't be read: Is a directory",
        Path("/dev/zero"): "run.yaml: can't be read: not a regular file",
    }

    for path, message in expected.items():
        with pytest.raises(ConfigError) as raised:
            read_run_file(path, label="run.yaml")
        assert str(raised.value) == message
