"""The schema that is read by `ast` equals the real class, and costs no import."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

from bigtrain.arguments.schema import load_schema, read_fields
from bigtrain.errors import ConfigError


def test_names_order_and_defaults_are_the_real_class_s() -> None:
    from bigtrain.trainer.arguments import TrainingArguments

    real = [field for field in dataclasses.fields(TrainingArguments) if field.init]
    schema = load_schema()

    assert list(schema) == [field.name for field in real]
    for field in real:
        missing = field.default is dataclasses.MISSING
        default = field.default_factory() if missing else field.default  # type: ignore[misc]
        assert schema[field.name].default == default, field.name


def test_help_and_choices_are_read() -> None:
    schema = load_schema()

    assert schema["learning_rate"].help == "The initial learning rate for the optimizer."
    assert schema["save_strategy"].choices == ("no", "steps", "epoch", "best")
    assert "cosine" in schema["lr_scheduler_type"].choices
    assert schema["fp16_opt_level"].choices == ("O0", "O1", "O2", "O3")
    assert all(field.help for field in schema.values())


def test_log_levels_are_transformers_own() -> None:
    from transformers.training_args import trainer_log_levels

    assert set(load_schema()["log_level"].choices) == set(trainer_log_levels)


def test_kinds_follow_the_annotation() -> None:
    schema = load_schema()

    assert schema["max_steps"].kinds == ("int",)
    assert schema["lr_scheduler_type"].kinds == ("str",)
    assert schema["report_to"].kinds == ("str", "list")
    assert schema["report_to"].optional
    assert schema["trackio_static_space_id"].kinds == ("str", "bool")
    assert schema["parallelism_config"].kinds == ("object",)


def test_older_spellings_of_annotations_are_understood(tmp_path: Path) -> None:
    source = tmp_path / "training_args.py"
    source.write_text(
        "class TrainingArguments:\n"
        "    a: Optional[int] = field(default=None, metadata={'help': 'what  a\\n is'})\n"
        "    b: Union[str, list[str], None] = None\n"
        "    c: 'float | Level' = field(default=1e-4)\n"
        "    d: ClassVar[int] = 3\n"
    )

    fields = read_fields(source, enums={"Level": ("low", "high")})

    assert list(fields) == ["a", "b", "c"]
    assert (fields["a"].kinds, fields["a"].optional, fields["a"].help) == (
        ("int",),
        True,
        "what a is",
    )
    assert fields["b"].kinds == ("str", "list")
    assert (fields["c"].kinds, fields["c"].choices) == (("float", "str"), ("low", "high"))
    assert fields["c"].default == 1e-4


def test_a_file_without_the_class_is_named(tmp_path: Path) -> None:
    source = tmp_path / "training_args.py"
    source.write_text("x = 1\n")

    with pytest.raises(ConfigError) as raised:
        read_fields(source, enums={})

    assert str(raised.value) == (
        f"{source} defines no class TrainingArguments; its version is not one that is supported"
    )


def test_loading_takes_no_import_and_little_time() -> None:
    code = (
        "import sys, time; from bigtrain.arguments.schema import load_schema\n"
        "start = time.process_time(); load_schema(); print(time.process_time() - start)\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert float(done.stdout) < 0.15
