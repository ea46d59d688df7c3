"""Secrets are known by their names and looks, and are refused without being shown."""

from __future__ import annotations

from pathlib import Path

import pytest

from bigtrain.errors import ConfigError
from bigtrain.layers import parse_assignment
from bigtrain.planning import Request, Surroundings, make_plan
from bigtrain.secrecy import SECRET_ADVICE, argument_faults


@pytest.mark.parametrize(
    "arguments",
    [
        ("--hub_token", "hf_abcdefghijklmnopqrstuvwx"),
        ("--hub_token=hf_abcdefghijklmnopqrstuvwx",),
        ("--wandb-api-key", "0123456789abcdef0123456789abcdef01234567"),
        ("--db_password", "hunter2"),
        ("--github-pat=x",),
        ("--passphrase", "a b c"),
        ("login.secret=1",),
        ("sk-abcdefghijklmnop0123",),
        ("--auth_token", "1a2b3c4d5e6f7a8b"),
    ],
)
def test_a_secret_among_a_script_s_arguments_is_found_and_not_shown(
    arguments: tuple[str, ...],
) -> None:
    faults = argument_faults(arguments)

    assert len(faults) == 1
    assert "must not be written into a plan" in faults[0]
    value = arguments[-1].rpartition("=")[2]
    assert len(value) < 4 or value not in faults[0]


@pytest.mark.parametrize(
    "arguments",
    [
        ("--pad_token", "<|pad|>"),
        ("--image_token=<image>",),
        ("--sort_key", "length"),
        ("--key_file", "/home/me/keys/id_rsa_2024_new"),
        ("--max_tokens", "4096"),
        ("--add_pad_token",),
        ("--learning_rate", "1e-4"),
        ("--output_dir", "runs/a1b2c3d4e5f6a7b8c9"),
        ("--model", "meta-llama/Meta-Llama-3-8B"),
    ],
)
def test_ordinary_arguments_are_none(arguments: tuple[str, ...]) -> None:
    assert argument_faults(arguments) == []


def test_a_script_with_a_secret_in_its_arguments_is_not_planned(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text("import torch\n")
    request = Request(target="train.py", script_args=("--token", "hf_abcdefghijklmnopqrstuvwx"))

    with pytest.raises(ConfigError) as raised:
        make_plan(request, Surroundings(environment={}, working_dir=tmp_path, is_rehearsal=True))

    assert str(raised.value) == (
        "--token: a secret's value must not be written into a plan; export it where bigtrain is "
        "started, and every rank inherits it"
    )


_TOKEN = "hf_ABCDEFGHIJKLMNOPQRSTUVWXYZ012345678"


@pytest.mark.parametrize(
    ("key", "value", "place"),
    [
        ("training.accelerator_config", "{a: {api_key: hunter2}}", ".a.api_key"),
        ("training.lr_scheduler_kwargs", "{password: hunter2}", ".password"),
        ("training.lr_scheduler_kwargs", '\'{"password": "hunter2"}\'', ""),
        ("training.optim_args", f"a=1,token={_TOKEN}", ""),
        ("training.optim_args", "a=1, password=hunter2", ""),
        ("training.fsdp_config", f"{{token: {_TOKEN}}}", ".token"),
        ("training.resume_from_checkpoint", _TOKEN, ""),
        ("training.report_to", f"[none, {_TOKEN}]", ".1"),
        ("cluster.env.FOO", _TOKEN, ""),
        ("cluster.env.PROXY", "http://me:hunter2@host", ""),
        ("model.name", f"https://me:{_TOKEN}@host/x", ""),
        ("name", _TOKEN, ""),
    ],
)
def test_a_secret_anywhere_in_a_run_file_is_refused_and_not_shown(
    key: str, value: str, place: str, tmp_path: Path
) -> None:
    (tmp_path / "run.yaml").write_text(
        "model: {config: {model_type: llama}}\ntokenizer: {kind: bytes}\n"
        "data: {name: builtin:python-docs}\ntraining: {max_steps: 1}\nengine: single\n"
    )

    with pytest.raises(ConfigError) as raised:
        _plan(tmp_path, f"{key}={value}")

    assert f"--set: {key}{place}: {SECRET_ADVICE}" in raised.value.faults
    assert not any(secret in str(raised.value) for secret in (_TOKEN, "hunter2"))


def test_names_and_values_that_only_begin_like_a_secret_s_are_planned(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(
        "name: hf_llama_finetune_v2\n"
        "model: {config: {model_type: llama, pad_token_id: 0}}\ntokenizer: {kind: bytes}\n"
        "data: {name: builtin:python-docs}\n"
        "training: {max_steps: 1, run_name: sk-learn-baseline-1, optim_args: 'eps=1e-8',\n"
        f"  hub_revision: {'0123456789' * 4}}}\n"
        "engine: single\ncluster: {env: {DATA: /data/hf_datasets_cache_dir, SORT_BY: key=length,\n"
        "  PWD: /home/me, DB_PASSWORD_FILE: /run/secrets/password}}\n"
    )

    _plan(tmp_path)


def _plan(folder: Path, *assignments: str) -> None:
    make_plan(
        Request(target="run.yaml", overrides=tuple(map(parse_assignment, assignments))),
        Surroundings(environment={}, working_dir=folder, is_rehearsal=True),
    )
