"""The plan is one file that crosses every process boundary unchanged."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from bigtrain.errors import ConfigError, LaunchError
from bigtrain.plan import (
    PLAN_VARIABLE,
    RunPlan,
    current_plan,
    read_plan,
    write_plan,
)
from bigtrain.secrecy import looks_secret
from bigtrain.translate import topology_for, translate
from bigtrain.translate.config import ENGINE_NAMES, EngineName, EngineOptions


def _plan(engine: EngineName = "fsdp", **more: Any) -> RunPlan:
    topology = topology_for(engine, procs_per_node=1 if engine == "single" else 2)
    options = EngineOptions(wrap_classes=("Block",)) if engine == "fsdp" else None
    translation = translate(
        {"bf16": True}, engine=engine, topology=topology, device="cpu", options=options
    )
    fields: dict[str, Any] = {
        "name": "größe ✓",
        "kind": "run_file",
        "source": "/runs/a b.yaml",
        "script_args": ("--lr", "1e-4"),
        "working_dir": "/runs",
        "topology": topology,
        "device": "cpu",
        "engine": translation.engine,
        "options": EngineOptions(forward_prefetch=2, wrap_classes=("Block",)),
        "fates": translation.fates,
        "model": {"config": {"rope": {"theta": 0.1}, "layers": [1, None, True]}},
        "training": {"learning_rate": 0.1 + 0.2, "report_to": ["tensorboard"]},
        "output_dir": "/runs/out",
        "preload": ("torch",),
        "environment": {"TOKENIZERS_PARALLELISM": "false"},
        "origins": {"training.bf16": "a b.yaml:3"},
    }
    return RunPlan(**fields | more)


@pytest.mark.parametrize("engine", ENGINE_NAMES)
def test_a_plan_comes_back_from_json_exactly(engine: EngineName) -> None:
    plan = _plan(engine)

    back = RunPlan.from_json(plan.to_json())

    assert back == plan
    assert back.to_json() == plan.to_json()
    assert type(back.engine.settings) is type(plan.engine.settings)


def test_the_plan_s_json_golden() -> None:
    content = json.loads(dataclasses.replace(_plan("ddp"), fates=()).to_json())

    assert content == {
        "format": 1,
        "name": "größe ✓",
        "kind": "run_file",
        "source": "/runs/a b.yaml",
        "script_args": ["--lr", "1e-4"],
        "working_dir": "/runs",
        "topology": {"nodes": 1, "procs_per_node": 2, "shard_size": 1},
        "device": "cpu",
        "engine": {
            "name": "ddp",
            "settings": {
                "find_unused_parameters": False,
                "bucket_cap_mb": None,
                "broadcast_buffers": None,
                "static_graph": False,
            },
            "compute_dtype": "bf16",
            "master_dtype": "fp32",
            "casts_weights": False,
            "reduce_dtype": "fp32",
        },
        "options": {"forward_prefetch": 2, "wrap_classes": ["Block"]},
        "fates": [],
        "model": {"config": {"rope": {"theta": 0.1}, "layers": [1, None, True]}},
        "tokenizer": {},
        "data": {},
        "training": {"learning_rate": 0.30000000000000004, "report_to": ["tensorboard"]},
        "output_dir": "/runs/out",
        "attempt": 1,
        "run_id": "",
        "begun_anew": "",
        "resume": "auto",
        "environment": {"TOKENIZERS_PARALLELISM": "false"},
        "start_method": "fork",
        "start_reason": "",
        "preload": ["torch"],
        "threads_per_rank": 1,
        "max_restarts": 0,
        "slurm": {},
        "interface": None,
        "join_timeout_s": 600,
        "stop_grace_s": None,
        "origins": {"training.bf16": "a b.yaml:3"},
    }


def test_a_process_finds_its_plan_through_one_variable(tmp_path: Path) -> None:
    path = tmp_path / "plans" / "attempt-01.json"
    write_plan(_plan(), path)

    assert current_plan({PLAN_VARIABLE: str(path)}) == _plan()
    assert current_plan({}) is None
    assert [entry.name for entry in path.parent.iterdir()] == ["attempt-01.json"]


def test_only_its_owner_may_read_a_plan(tmp_path: Path) -> None:
    write_plan(_plan(), tmp_path / "plan.json")

    assert (tmp_path / "plan.json").stat().st_mode & 0o777 == 0o600


def test_a_plan_is_never_written_over_another_attempt_s(tmp_path: Path) -> None:
    path = tmp_path / "attempt-01.json"
    write_plan(_plan(), path)

    with pytest.raises(LaunchError) as raised:
        write_plan(_plan(name="other"), path)

    assert str(raised.value) == (
        f"{path} exists already: another launch into this directory started just now; wait for "
        "it, or give another --output-dir"
    )
    assert read_plan(path) == _plan()
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "this is not a plan of bigtrain's: JSONDecodeError"),
        ("[]", "this is not a plan of bigtrain's: KeyError('format')"),
        ("3", "this is not a plan of bigtrain's: TypeError"),
        ("{}", "this is not a plan of bigtrain's: KeyError('format')"),
        ('{"format": 1}', "this is not a plan of bigtrain's: KeyError('engine')"),
        (
            '{"format": 2}',
            "the plan has format 2, and this bigtrain reads format 1; use the version of "
            "bigtrain that wrote it",
        ),
    ],
)
def test_what_is_no_plan_is_refused_with_its_path(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "attempt-01.json"
    path.write_text(text)

    with pytest.raises(ConfigError) as raised:
        read_plan(path)

    assert str(raised.value).startswith(f"{path}: {message}")


def test_a_plan_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"the plan .*nowhere\.json can't be read"):
        current_plan({PLAN_VARIABLE: str(tmp_path / "nowhere.json")})


@pytest.mark.parametrize(
    "name",
    [
        "HF_TOKEN",
        "WANDB_API_KEY",
        "my_password",
        "AWS_SECRET_ID",
        "GITHUB_PAT",
        "DB_PWD",
        "SSH_PASSPHRASE",
        "AZURE_CREDENTIAL",
    ],
)
def test_a_secret_s_value_can_not_enter_a_plan(name: str) -> None:
    with pytest.raises(ConfigError) as raised:
        _plan(environment={name: "s3cret"})

    assert str(raised.value) == (
        f"{name}: a secret's value must not be written into a plan; export it where bigtrain is "
        "started, and every rank inherits it"
    )


def test_the_path_of_a_file_that_holds_a_secret_may_be_in_a_plan() -> None:
    variables = {"HF_TOKEN_PATH": "/home/me/.cache/huggingface/token"}

    assert _plan(environment=variables).environment == variables
    with pytest.raises(ConfigError, match="HF_TOKEN_PATH: a secret"):
        _plan(environment={"HF_TOKEN_PATH": "hf_abcdefghijklmnop"})


@pytest.mark.parametrize("name", ["TOKENIZERS_PARALLELISM", "MONKEY", "NCCL_DEBUG", "PWD", "PATH"])
def test_ordinary_names_do_not_look_secret(name: str) -> None:
    assert not looks_secret(name)
