"""What a run file names and is not there is told before anything starts, with all else."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from bigtrain.errors import ConfigError
from bigtrain.planning import Request, Surroundings, make_plan
from bigtrain.run_inputs import directory_faults

_RUN = """\
model:
  config: {{model_type: llama, hidden_size: 64}}
tokenizer: {{kind: bytes}}
data: {{{data}, sequence_length: 32}}
training: {{max_steps: 1{training}}}
"""


def _plan(folder: Path, data: str, *, training: str = "", device_memory: int | None = None) -> None:
    (folder / "run.yaml").write_text(_RUN.format(data=data, training=training))
    surroundings = Surroundings(
        environment={"CUDA_VISIBLE_DEVICES": ""},
        working_dir=folder,
        is_rehearsal=True,
        device_memory=device_memory,
    )
    make_plan(Request(target="run.yaml"), surroundings)


def _faults(folder: Path, data: str, *, training: str = "") -> tuple[str, ...]:
    with pytest.raises(ConfigError) as raised:
        _plan(folder, data, training=training)
    return raised.value.faults


def test_missing_files_are_told_with_what_is_near_and_with_all_other_faults(tmp_path: Path) -> None:
    (tmp_path / "corpus.txt").write_text("text")

    wrong_engine = _faults(tmp_path, "train_files: corpsu.txt", training=", bf16: true, fp16: true")
    wrong_key = _faults(tmp_path, "train_files: corpsu.txt", training=", lerning_rate: 1")

    missing = (
        f"run.yaml:4: data.train_files: {tmp_path}/corpsu.txt names no file; "
        f"in {tmp_path} there is corpus.txt"
    )
    assert wrong_engine == (
        missing,
        "run.yaml:5: training.fp16: bf16 and fp16 are both true; keep one of them",
    )
    assert wrong_key[0] == missing
    assert wrong_key[1].endswith("unknown key; did you mean 'learning_rate'?")


def test_a_glob_has_to_name_a_file(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")

    _plan(tmp_path, "train_files: ['*.txt']")

    assert "names no file" in _faults(tmp_path, "train_files: ['*.txt', '*.md']")[0]
    assert "eval_files" in _faults(tmp_path, "train_files: a.txt, eval_files: b.txt")[0]


@pytest.mark.parametrize("name", ["rows.csv", "rows.jsonl", "rows.jsonl.gz"])
def test_the_column_of_the_text_has_to_be_there(tmp_path: Path, name: str) -> None:
    rows = "body,n\nsome text,1\n" if name.endswith("csv") else '{"body": "text", "n": 1}\n'
    path = tmp_path / name
    path.write_bytes(gzip.compress(rows.encode()) if name.endswith("gz") else rows.encode())

    _plan(tmp_path, f"train_files: {name}, text_field: body")

    assert _faults(tmp_path, f"train_files: {name}") == (
        f"run.yaml:4: data.text_field: {path} has no column 'text'; it has body, n",
    )


def test_a_column_that_some_rows_lack_is_there(tmp_path: Path) -> None:
    rows = [{"id": 1}, {"text": "some"}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    _plan(tmp_path, "train_files: rows.jsonl")


def test_what_a_look_can_not_tell_is_left_to_whoever_reads_it(tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_text('[\n{"body": "text"}\n]\n')
    (tmp_path / "empty.csv").write_text("")

    _plan(tmp_path, "train_files: rows.json")
    _plan(tmp_path, "train_files: empty.csv")


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ("{name: ./modle}", "./modle is not a directory; did you mean 'model'?"),
        ("{name: model}", "model has no config.json; it holds weights"),
        ("{name: model/weights}", "model/weights is a file; give the directory that holds it"),
        (
            "{name: modl/b/c}",
            "modl/b/c is neither a directory here nor a repository of the hub, as in owner/name",
        ),
        (
            "{name: 'http://a/b'}",
            "http://a/b is neither a directory here nor a repository of the hub, as in owner/name",
        ),
    ],
)
def test_a_model_s_directory_has_to_hold_one(tmp_path: Path, said: str, message: str) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "weights").touch()
    (tmp_path / "run.yaml").write_text(
        f"model: {said}\ntokenizer: {{kind: bytes}}\ndata: builtin:python-docs\n"
    )
    surroundings = Surroundings(environment={}, working_dir=tmp_path, is_rehearsal=True)

    with pytest.raises(ConfigError) as raised:
        make_plan(Request(target="run.yaml"), surroundings)

    assert str(raised.value) == f"run.yaml:1: model.name: {message}"


def test_a_model_s_directory_has_to_hold_weights(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "run.yaml").write_text(
        "model: model\ntokenizer: {kind: bytes}\ndata: builtin:python-docs\n"
    )
    surroundings = Surroundings(environment={}, working_dir=tmp_path, is_rehearsal=True)

    with pytest.raises(ConfigError) as raised:
        make_plan(Request(target="run.yaml"), surroundings)

    assert str(raised.value) == (
        "run.yaml:1: model.name: model has no weights (model.safetensors or pytorch_model.bin, "
        "whole or by an index); it holds config.json"
    )


@pytest.mark.parametrize(
    "name", ["gpt2", "a/b", "a.b-c_d/e", "a--b", "a/b.git", "a/b/c", "ä/b", "a b", "a..b", "-a"]
)
def test_a_repository_s_name_is_what_the_hub_takes_for_one(name: str, tmp_path: Path) -> None:
    def is_taken_by_the_hub() -> bool:
        try:
            validate_repo_id(name)
        except HFValidationError:
            return False
        return True

    found = list(directory_faults("model.name", name, (), tmp_path))

    assert (not found) == is_taken_by_the_hub()


def test_a_model_s_directory_has_to_hold_its_tokenizer_unless_another_is_named(
    tmp_path: Path,
) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "pytorch_model.bin").touch()
    (tmp_path / "model" / "config.json").write_text('{"model_type": "llama"}')
    surroundings = Surroundings(environment={}, working_dir=tmp_path, is_rehearsal=True)
    text = "model: ./model\ndata: builtin:python-docs\n"

    (tmp_path / "run.yaml").write_text(text + "tokenizer: {kind: bytes}\n")
    make_plan(Request(target="run.yaml"), surroundings)

    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"\./model has no tokenizer_config\.json; it holds conf"):
        make_plan(Request(target="run.yaml"), surroundings)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("{", "config.json is no JSON object with a model_type"),
        ("[" * 100_000, "config.json is no JSON object with a model_type"),
        ("{}", "config.json is no JSON object with a model_type"),
        (
            '{"model_type": "lama"}',
            "config.json: model_type: 'lama' is unknown; did you mean 'llama'?",
        ),
        (
            '{"model_type": "mine", "auto_map": {}}',
            "config.json: model_type: 'mine' is unknown; model.trust_remote_code: true runs the "
            "code that comes with it",
        ),
        (
            '{"model_type": "gpt2", "n_layer": 1000000000}',
            "config.json: n_layer: 1000000000 layers are too many; give at most 2000",
        ),
        (
            '{"model_type": "t5"}',
            "config.json: model_type: 't5' is no causal language model in transformers, and a run "
            "file trains one",
        ),
        (
            '{"model_type": "llama", "hidden_size": "wide", "of_its_own": 1}',
            "config.json: hidden_size: 'wide' is not a whole number",
        ),
    ],
)
def test_a_config_that_could_not_be_loaded_is_told(
    tmp_path: Path, config: str, message: str
) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "pytorch_model.bin").touch()
    (tmp_path / "model" / "config.json").write_text(config)
    (tmp_path / "run.yaml").write_text(
        "model: ./model\ntokenizer: {kind: bytes}\ndata: builtin:python-docs\nengine: single\n"
    )
    surroundings = Surroundings(environment={}, working_dir=tmp_path, is_rehearsal=True)

    with pytest.raises(ConfigError) as raised:
        make_plan(Request(target="run.yaml"), surroundings)

    assert str(raised.value) == f"run.yaml:1: model.name: ./model: {message}"


def test_a_config_with_a_class_of_its_own_is_taken_where_its_code_may_run(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    config = '{"model_type": "mine", "auto_map": {"AutoConfig": "configuration.Mine"}}'
    (tmp_path / "model" / "pytorch_model.bin").touch()
    (tmp_path / "model" / "config.json").write_text(config)
    (tmp_path / "run.yaml").write_text(
        "model: {name: ./model, trust_remote_code: true}\n"
        "tokenizer: {kind: bytes}\ndata: builtin:python-docs\nengine: single\n"
    )

    make_plan(
        Request(target="run.yaml"),
        Surroundings(environment={}, working_dir=tmp_path, is_rehearsal=True),
    )


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ('"a\\0b"', "'a\\x00b' holds a NUL character, which no name can have"),
        ("a" * 300, f"{'a' * 60}… is too long to be the name of anything"),
    ],
)
def test_a_name_that_nothing_can_have_is_told(tmp_path: Path, name: str, why: str) -> None:
    assert _faults(tmp_path, f"train_files: [{name}]") == (
        f"run.yaml:4: data.train_files.0: {why}",
    )


def test_a_name_of_built_in_text_has_to_be_one(tmp_path: Path) -> None:
    assert "is not one of builtin:python-docs" in _faults(tmp_path, "name: 'builtin:poems'")[0]


def test_a_plan_for_another_machine_does_not_ask_this_one_for_data(tmp_path: Path) -> None:
    _plan(tmp_path, "train_files: nowhere.txt", device_memory=80 << 30)
