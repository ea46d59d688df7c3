"""Every argument has a fate, and none is accepted and then forgotten."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import bigtrain
from bigtrain.arguments.schema import Field, load_schema
from bigtrain.errors import UnsupportedError
from bigtrain.translate import topology_for, translate
from bigtrain.translate.config import ENGINE_NAMES
from bigtrain.translate.fates import FATES, is_default, refusals


def test_every_field_of_the_installed_transformers_has_a_fate() -> None:
    assert set(FATES) == set(load_schema())


def test_every_rule_says_something() -> None:
    assert all(rule.detail for rule in FATES.values())


@pytest.mark.parametrize("engine", ENGINE_NAMES)
def test_a_translation_tells_every_argument_s_fate_in_order(engine: Any) -> None:
    procs = 1 if engine == "single" else 2
    topology = topology_for(engine, procs_per_node=procs)

    fates = translate({}, engine=engine, topology=topology, device="cpu").fates

    assert [fate.argument for fate in fates] == list(load_schema())
    assert all(fate.detail for fate in fates)


def test_a_field_that_is_new_in_transformers_is_refused_once_it_is_set() -> None:
    new = Field(
        name="warp_drive", annotation="bool", kinds=("bool",), optional=False, default=False
    )
    schema = {**load_schema(), "warp_drive": new}

    assert list(refusals({"warp_drive": False}, schema)) == []
    assert list(refusals({"warp_drive": True}, schema)) == [
        ("warp_drive", "this version of transformers has it and bigtrain does not know it yet")
    ]


@pytest.fixture(scope="module")
def newer_transformers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A module path with the installed transformers and one more argument in it, as its next
    release might have."""
    installed = Path(str(importlib.util.find_spec("transformers").origin)).parent  # type: ignore[union-attr]
    place: Path = tmp_path_factory.mktemp("newer")
    (place / "transformers").mkdir()
    for entry in installed.iterdir():
        if entry.name not in ("__pycache__", "training_args.py"):
            (place / "transformers" / entry.name).symlink_to(entry)
    text = (installed / "training_args.py").read_text()
    first = "    do_train: bool = field("
    assert text.count(first) == 1
    more = '    warp_drive: bool = field(default=False, metadata={"help": "Faster."})\n'
    (place / "transformers" / "training_args.py").write_text(text.replace(first, more + first))
    return place


def _run(path: Path, folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    root = Path(bigtrain.__file__).parents[1]
    return subprocess.run(
        [sys.executable, *command],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": f"{path}{os.pathsep}{root}"},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("engine", ["single", "zero2"])
def test_a_plan_refuses_what_a_newer_transformers_has_unless_it_is_at_its_default(
    newer_transformers: Path, tmp_path: Path, engine: str
) -> None:
    (tmp_path / "run.yaml").write_text(
        "model: {config: {model_type: llama, hidden_size: 64}}\ntokenizer: {kind: bytes}\n"
        f"data: builtin:python-docs\nengine: {engine}\ntraining: {{warp_drive: true}}\n"
    )
    plan = ("-m", "bigtrain", "plan", "run.yaml", "--all")

    refused = _run(newer_transformers, tmp_path, *plan)
    at_default = _run(newer_transformers, tmp_path, *plan, "--set", "training.warp_drive=false")

    assert (refused.returncode, refused.stderr) == (
        2,
        "error: run.yaml:5: training.warp_drive: not supported: this version of transformers has "
        "it and bigtrain does not know it yet\n",
    )
    assert at_default.returncode == 0, at_default.stderr
    (row,) = [line for line in at_default.stdout.splitlines() if line.startswith("  warp_drive")]
    assert row.split(maxsplit=3)[2:] == [
        "no_effect",
        "at its default; else refused: bigtrain does not know it yet",
    ]


def test_a_trainer_refuses_what_a_newer_transformers_has(
    newer_transformers: Path, tmp_path: Path
) -> None:
    program = (
        "import sys, torch, bigtrain\n"
        "args = bigtrain.TrainingArguments(\n"
        "    output_dir='out', use_cpu=True, report_to=[], warp_drive=sys.argv[1] == 'on')\n"
        "bigtrain.Trainer(model=torch.nn.Linear(1, 1), args=args, train_dataset=[{'x': 1}])\n"
    )

    refused = _run(newer_transformers, tmp_path, "-c", program, "on")
    at_default = _run(newer_transformers, tmp_path, "-c", program, "off")

    assert refused.stderr.splitlines()[-1].endswith(
        "training.warp_drive: not supported: this version of transformers has it and bigtrain "
        "does not know it yet"
    )
    assert at_default.returncode == 0, at_default.stderr


def test_what_no_engine_supports_is_refused_by_name_with_its_origin() -> None:
    values = {"use_ipex": True, "parallelism_config": {"tp_size": 2}}

    with pytest.raises(UnsupportedError) as raised:
        translate(
            values,
            engine="single",
            topology=topology_for("single"),
            device="cpu",
            origins={"training.use_ipex": "run.yaml:7"},
        )

    assert raised.value.faults == (
        "training.parallelism_config: not supported: only data parallelism is supported; leave "
        "it out",
        "run.yaml:7: training.use_ipex: not supported: bigtrain does not drive Intel's extension; "
        "leave it out and use bf16: true, for which PyTorch has Intel's kernels itself",
    )


def test_a_live_object_with_nothing_set_asks_for_nothing(tmp_path: Path) -> None:
    args = bigtrain.TrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    values = {
        field.name: getattr(args, field.name) for field in dataclasses.fields(args) if field.init
    }

    assert list(refusals(values, load_schema())) == []


@pytest.mark.parametrize(
    ("value", "default", "same"),
    [(None, "none", True), ([], "none", True), ([], "", True), ([], 3, False), (0, 1, False)],
)
def test_what_counts_as_a_default(value: Any, default: Any, same: bool) -> None:
    assert is_default(value, default) is same


def test_what_the_loop_is_said_to_handle_is_read_somewhere() -> None:
    sources = "\n".join(
        path.read_text() for part in ("trainer", "worker.py") for path in _python_files(part)
    )
    by_loop = [name for name, rule in FATES.items() if rule.fate == "loop"]

    unread = [name for name in by_loop if not re.search(rf"\b{name}\b", sources)]

    assert set(unread) <= _READ_BY_TRANSFORMERS, sorted(set(unread) - _READ_BY_TRANSFORMERS)


# Read by transformers' own callbacks, by its TrainingArguments, or left to a user's script.
_READ_BY_TRANSFORMERS = {
    "disable_tqdm",
    "do_predict",
    "do_train",
    "project",
    "run_name",
    "tf32",
    "trackio_bucket_id",
    "trackio_space_id",
    "trackio_static_space_id",
    # By its flow callback, its optimizer factory, or under another name of the same thing.
    "eval_delay",
    "eval_steps",
    "gradient_checkpointing",
    "optim_target_modules",
    "per_device_eval_batch_size",
    "save_steps",
}


def _python_files(part: str) -> list[Path]:
    root = Path(bigtrain.__file__).parent / part
    return [root] if root.is_file() else sorted(root.rglob("*.py"))
