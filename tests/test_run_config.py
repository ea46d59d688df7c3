"""A run file with `--set` and flags on top: validated, with origins, all faults at once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bigtrain.errors import ConfigError
from bigtrain.layers import Override, parse_assignment
from bigtrain.run_config import RunConfig, load_run_config, load_script_config

GOOD = """\
model:
  config: {model_type: llama, hidden_size: 64}
tokenizer: {kind: bytes}
data:
  name: builtin:python-docs
  sequence_length: 128
  packing: yes
training:
  learning_rate: 1e-3
  save_strategy: no
engine: fsdp
"""


@pytest.fixture
def load(tmp_path: Path) -> Callable[..., RunConfig]:
    def load_text(text: str, *assignments: str | Override) -> RunConfig:
        path = tmp_path / "quick.yaml"
        path.write_text(text)
        overrides = [parse_assignment(a) if isinstance(a, str) else a for a in assignments]
        return load_run_config(path, label="quick.yaml", overrides=overrides)

    return load_text


Load = Callable[..., RunConfig]


def _faults(load: Load, text: str, *assignments: str) -> list[str]:
    with pytest.raises(ConfigError) as raised:
        load(text, *assignments)
    return list(raised.value.faults)


@pytest.mark.parametrize("said", [True, False, ["full_shard", "auto_wrap"], "full_shard auto_wrap"])
def test_fsdp_is_a_truth_text_or_a_list(load: Load, said: Any) -> None:
    assert (
        load(GOOD, Override(key="training.fsdp", value=said, origin="x")).training["fsdp"] == said
    )


@pytest.mark.parametrize("said", ["eager", "sdpa", "paged|sdpa", "kernels-community/flash-attn"])
def test_an_attention_is_one_that_transformers_has_or_a_kernel_s(load: Load, said: str) -> None:
    key = "model.attn_implementation"

    assert load(GOOD, Override(key=key, value=said, origin="x")).model.attn_implementation == said
    (fault,) = _faults(load, GOOD, f"{key}=sdpaa")
    assert fault == f"--set: {key}: 'sdpaa' is not supported; did you mean 'sdpa'?"


def test_a_run_file_becomes_typed_sections_with_defaults(load: Load) -> None:
    config = load(GOOD)

    assert (config.name, config.output_dir) == ("quick", "runs/quick")
    assert config.model.config == {"model_type": "llama", "hidden_size": 64}
    assert config.tokenizer is not None
    assert config.tokenizer.said() == {"kind": "bytes"}
    assert config.data.said() == {
        "name": "builtin:python-docs",
        "text_field": "text",
        "sequence_length": 128,
        "packing": True,
    }
    assert config.training == {"learning_rate": 1e-3, "save_strategy": "no"}
    assert config.engine.name == "fsdp"
    assert config.cluster.nodes == 1


def test_every_value_knows_where_it_was_said(load: Load) -> None:
    config = load(
        GOOD,
        "engine=zero2",
        "model.config.hidden_size=32",
        "training.max_steps=9",
        Override(key="engine.name", value="ddp", origin="flag --engine"),
    )

    assert config.engine.name == "ddp"
    assert config.model.config == {"model_type": "llama", "hidden_size": 32}
    origins = {key: origin for key, origin in config.origins.items() if "." in key}
    assert origins == {
        "model.config": "quick.yaml:2",
        "model.config.model_type": "quick.yaml:2",
        "model.config.hidden_size": "--set",
        "tokenizer.kind": "quick.yaml:3",
        "data.name": "quick.yaml:5",
        "data.sequence_length": "quick.yaml:6",
        "data.packing": "quick.yaml:7",
        "training.learning_rate": "quick.yaml:9",
        "training.save_strategy": "quick.yaml:10",
        "training.max_steps": "--set",
        "engine.name": "flag --engine",
    }


def test_a_null_takes_a_value_back(load: Load) -> None:
    config = load(GOOD, "model.config=null", "model.name=org/model", "tokenizer=null")

    assert config.model.said() == {"name": "org/model", "trust_remote_code": False}
    assert config.tokenizer is None


def test_a_section_that_is_one_word_means_its_name(load: Load) -> None:
    config = load("model: org/model\ndata: {name: org/data}\n")

    assert config.model.name == "org/model"
    assert config.origins["model.name"] == "quick.yaml:1"


def test_output_dir_among_the_training_arguments_is_the_run_s(load: Load) -> None:
    config = load(GOOD, "training.output_dir=elsewhere")

    assert config.output_dir == "elsewhere"
    assert "output_dir" not in config.training


BAD = """\
nam: quick
learning_rate: 3
model:
  config: {hidden_size: 64}
  name: org/model
data:
  nam: builtin:python-docs
  sequence_length: abc
  packing: 3
training:
  learning_rte: 1e-3
  max_steps: 20.5
  save_strategy: nope
  bf16: perhaps
  hub_token: abc
  procs_per_node: 3
engine: fsdpp
cluster:
  procs_per_node: 0
  start: forkserver
  env: {WANDB_API_KEY: x, FOO: [1]}
"""


def test_all_faults_of_a_file_are_told_at_once_with_their_lines(load: Load) -> None:
    secret = (
        "a secret's value must not be written into a plan; export it where bigtrain is started, "
        "and every rank inherits it"
    )

    assert _faults(load, BAD, "training.fp16=3", "global_batch_size=0") == [
        "--set: global_batch_size: 0 is too small; it must be at least 1",
        "--set: training.fp16: 3 is not true or false",
        "quick.yaml:1: nam: unknown key; did you mean 'name'?",
        "quick.yaml:2: learning_rate: unknown key; it belongs under training:",
        "quick.yaml:3: model: give either name (a hub id or a path) or config (from scratch)",
        "quick.yaml:7: data.nam: unknown key; did you mean 'name'?",
        "quick.yaml:8: data.sequence_length: 'abc' is not a whole number",
        "quick.yaml:9: data.packing: 3 is not true or false",
        "quick.yaml:11: training.learning_rte: unknown key; did you mean 'learning_rate'?",
        "quick.yaml:12: training.max_steps: 20.5 is not a whole number",
        "quick.yaml:13: training.save_strategy: 'nope' is not one of no, steps, epoch, best; "
        "did you mean 'no'?",
        "quick.yaml:14: training.bf16: 'perhaps' is not true or false",
        f"quick.yaml:15: training.hub_token: {secret} (as HF_TOKEN)",
        "quick.yaml:16: training.procs_per_node: unknown key; it belongs under cluster:",
        "quick.yaml:17: engine.name: 'fsdpp' is not one of auto, single, ddp, fsdp, zero1, zero2, "
        "zero3; did you mean 'fsdp'?",
        "quick.yaml:19: cluster.procs_per_node: 0 is too small; it must be at least 1",
        "quick.yaml:20: cluster.start: 'forkserver' is not one of fork, fresh",
        f"quick.yaml:21: cluster.env.WANDB_API_KEY: {secret}",
        "quick.yaml:21: cluster.env.FOO: [1] is not text",
    ]


@pytest.mark.parametrize(
    ("text", "faults"),
    [
        (
            "",
            [
                "quick.yaml: the section model is missing",
                "quick.yaml: the section data is missing",
            ],
        ),
        (
            "model: {config: {model_type: llama}}\ndata: {name: org/data}\n",
            [
                "quick.yaml: tokenizer: missing; a model from scratch brings none; give "
                "tokenizer.name, or kind: bytes"
            ],
        ),
        (
            "model: org/model\ndata: [a]\ntraining: fast\n",
            [
                "quick.yaml:2: data: ['a'] is not a section; write its keys below it, indented",
                "quick.yaml:3: training: 'fast' is not a section; write its keys below it, "
                "indented",
            ],
        ),
        (
            "model: org/model\ndata: {train_files: a.txt, eval_files: b.txt, eval_split: 0.1}\n",
            [
                "quick.yaml:2: data: eval_files and eval_split both say what to evaluate on; "
                "keep one"
            ],
        ),
        (
            "model: {}\ndata: {}\ntokenizer: {}\n",
            [
                "quick.yaml:1: model: give either name (a hub id or a path) or config (from "
                "scratch)",
                "quick.yaml:2: data: give either name (a hub id or builtin:…) or train_files",
                "quick.yaml:3: tokenizer: give either name (a hub id or a path) or kind: bytes",
            ],
        ),
        (
            "model: org/model\ndata: {train_files: a.txt, format: xml}\n",
            ["quick.yaml:2: data.format: 'xml' is not one of text, json, parquet, csv"],
        ),
        (
            "model: org/model\ndata: {train_files: a.txt, eval_split: 2}\n",
            [
                "quick.yaml:2: data.eval_split: 2 is neither a share between 0 and 1 nor a "
                "split's name"
            ],
        ),
        (
            "model: org/model\ndata: org/data\n"
            "training:\n  eval_strategy: steps\n  do_predict: true\n",
            [
                "quick.yaml:4: training.eval_strategy: steps, but there is nothing to evaluate "
                "on; set data.eval_split (0.05, say) or eval_files",
                "quick.yaml:5: training.do_predict: a run file names no data to predict on; "
                "leave it out, or use a script",
            ],
        ),
        (
            "model: org/model\ndata: org/data\noutput_dir: a\ntraining: {output_dir: b}\n",
            [
                "quick.yaml:4: training.output_dir: 'b' and output_dir at the top, 'a', differ; "
                "keep one"
            ],
        ),
    ],
)
def test_what_contradicts_itself_is_refused(load: Load, text: str, faults: list[str]) -> None:
    assert _faults(load, text) == faults


def test_a_length_that_nobody_said_is_called_the_default_or_not_spoken_of(load: Load) -> None:
    model = "model: {config: {model_type: llama, max_position_embeddings: 128}}\n"
    model += "tokenizer: {kind: bytes}\n"
    assert _faults(load, model + "data: {name: org/data}\n") == [
        "quick.yaml:1: model.config.max_position_embeddings: the model has 128 positions "
        "(max_position_embeddings), but data.sequence_length is 1024 by default; make one fit the "
        "other"
    ]
    assert _faults(load, model + "data: {name: org/data, sequence_lenght: 64}\n") == [
        "quick.yaml:3: data.sequence_lenght: unknown key; did you mean 'sequence_length'?"
    ]


@pytest.mark.parametrize("text", ["engine", "=x", "engine..name=x", ".=x"])
def test_an_assignment_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ConfigError) as raised:
        parse_assignment(text)

    assert str(raised.value) == f"--set {text}: write section.key=value, as in engine.name=fsdp"


def test_a_script_takes_engine_and_cluster_alone() -> None:
    config = load_script_config([parse_assignment("engine=ddp"), parse_assignment("name=mine")])
    assert (config.engine.name, config.name) == ("ddp", "mine")

    with pytest.raises(ConfigError) as raised:
        load_script_config([parse_assignment("training.learning_rate=1")])
    assert str(raised.value) == (
        "--set: training.learning_rate: a script sets this itself: give it to the script, after --"
    )


@pytest.mark.parametrize("name", ["../../evil", "a/../b", "/a", "..", ".", "a\\\\b", ""])
def test_a_run_s_name_is_no_path(name: str, load: Load) -> None:
    (fault,) = _faults(load, GOOD, f'name="{name}"')

    assert fault.startswith("--set: name: ")
    assert fault.endswith("is no run's name, which a directory below runs/ has too; use a word")


def test_numbers_without_end_are_refused_and_not_repeated(load: Load) -> None:
    endless = "1" + 400 * "0"
    keys = ("global_batch_size", "data.sequence_length", "training.seed", "cluster.env.N")

    faults = _faults(load, GOOD, *(f"{key}={endless}" for key in keys))

    what = "too large a number: none may have 64 bits or more"
    assert sorted(faults) == sorted(f"--set: {key}: {what}" for key in keys)


def test_variables_are_text_in_the_end(load: Load) -> None:
    config = load(GOOD, "cluster.env={A: 4, B: true, C: x}")

    assert config.cluster.environment() == {"A": "4", "B": "true", "C": "x"}


def test_what_a_model_from_scratch_can_not_be_is_told_with_its_line(load: Load) -> None:
    text = (
        "model:\n  config:\n    model_type: llama\n    hiden_size: 64\n    num_attention_heads: 3\n"
        "tokenizer: {kind: bytes}\ndata: {name: builtin:python-docs, sequence_length: 4096}\n"
    )

    assert _faults(load, text) == [
        "quick.yaml:2: model.config.max_position_embeddings: the model has 2048 positions "
        "(max_position_embeddings), but data.sequence_length is 4096; make one fit the other",
        "quick.yaml:4: model.config.hiden_size: unknown key; did you mean 'hidden_size'?",
        "quick.yaml:5: model.config.num_attention_heads: 3 heads do not divide the hidden size "
        "4096; use 2 or 4",
    ]


def test_a_split_of_files_that_have_none_is_refused(load: Load) -> None:
    text = GOOD.replace("  name: builtin:python-docs", "  train_files: [a.txt]\n  eval_split: test")

    [fault] = _faults(load, text)
    assert fault.endswith(
        "eval_split 'test' names a split, and train_files have none; give a share such as 0.05, or "
        "eval_files"
    )
