"""Secrets are known by their names and looks, and are refused without being shown."""

from __future__ import annotations

from pathlib import Path

import pytest

from bigtrain.errors import ConfigError
from bigtrain.planning import Request, Surroundings, make_plan
from bigtrain.secrecy import argument_faults


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
