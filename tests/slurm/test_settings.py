from __future__ import annotations

import pytest

from bigtrain.errors import ConfigError
from bigtrain.slurm.settings import read_settings


@pytest.mark.parametrize(
    ("options", "gpus"),
    [
        ({}, None),
        ({"gpus_per_node": 8}, 8),
        ({"gpus_per_node": "a100:4"}, 4),
        ({"gpus_per_node": "a100:2,v100:6"}, 8),
        ({"gres": "gpu:a100:2,gpu:v100:6"}, 8),
        ({"gres": "gpu:2"}, 2),
        ({"gres": "gpu:a100:4,nvme:1"}, 4),
        ({"gres": "nvme:1,gpu"}, 1),
        ({"gres": "gres/gpu:3"}, 3),
        ({"gres": "nvme:1"}, None),
    ],
)
def test_the_gpus_of_a_node_are_found_where_they_are_asked_for(
    options: dict[str, object], gpus: int | None
) -> None:
    assert read_settings(options).gpus_per_node == gpus


def test_own_keys_and_options_are_told_apart() -> None:
    settings = read_settings(
        {"modules": ["cuda/12.4"], "setup": "ulimit -l unlimited", "qos": "high", "snapshot": True}
    )
    assert settings.modules == ("cuda/12.4",)
    assert settings.snapshot
    assert settings.options == {"qos": "high"}


def test_dashes_and_underscores_are_the_same_in_own_keys_too() -> None:
    settings = read_settings({"spare-nodes": "1", "max_requeues": 3, "max-requeues": "5"})
    assert (settings.spare_nodes, settings.max_requeues) == (1, 5)
    assert settings.options == {}
    with pytest.raises(ConfigError, match=r"^--sbatch: cluster.slurm.max-requeues: '²' is not a"):
        read_settings({"max-requeues": "²"}, origins={"max-requeues": "--sbatch"})


def test_files_below_the_home_directory_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    settings = read_settings({"python": "~/venv/bin/python", "template": "~/x.sbatch"})
    assert settings.python == "/home/me/venv/bin/python"
    assert settings.template == "/home/me/x.sbatch"
    assert not settings.finds_bigtrain
    for text in ("python3", "./python"):
        assert read_settings({"python": text}).python == text
    with pytest.raises(ConfigError, match="python: '~nobody-here/x': there is no such home"):
        read_settings({"python": "~nobody-here/x"})


def test_faults_of_own_keys_and_of_options_come_together() -> None:
    with pytest.raises(ConfigError) as caught:
        read_settings({"modules": 3, "max_requeues": -1, "qoss": "high"})
    assert caught.value.faults == (
        "cluster.slurm.modules: 3 is not a list of module names",
        "cluster.slurm.max_requeues: -1 is not a whole number from 0 on",
        "cluster.slurm.qoss: sbatch has no such option; did you mean 'qos'?",
    )


def test_a_token_in_a_command_of_the_setup_or_an_option_is_refused_and_not_shown() -> None:
    token = "hf_" + "abcdefghijklmnop1234"
    with pytest.raises(ConfigError) as caught:
        read_settings({"setup": f"huggingface-cli login --token {token}", "comment": token})
    assert len(caught.value.faults) == 2
    assert token not in str(caught.value)


@pytest.mark.parametrize(
    "text", ["HF_TOKEN_PATH=/x", "HF_TOKEN_PATH='~/my token'", "db_password_file=/run/p"]
)
def test_the_setup_may_say_where_a_secret_lies(text: str) -> None:
    assert read_settings({"setup": f"export {text}"}).setup == f"export {text}"


@pytest.mark.parametrize("text", ["HF_TOKEN=/x", "HF_TOKEN_PATH=hunter2"])
def test_the_setup_may_not_spell_a_secret_out(text: str) -> None:
    with pytest.raises(ConfigError, match=f"setup: {text.partition('=')[0]}: a secret's value"):
        read_settings({"setup": f"export {text}"})
