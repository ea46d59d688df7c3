"""The command line as a person meets it: texts to the byte, exit codes, streams and speed."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from bigtrain.cli import error_text
from bigtrain.errors import BigtrainError, ConfigError, LaunchError
from bigtrain.plan import RunPlan, read_plan

RUN = """\
model:
  config: {model_type: llama, hidden_size: 64}
tokenizer: {kind: bytes}
data: {name: builtin:python-docs, sequence_length: 128}
training:
  bf16: true
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "quick.yaml").write_text(RUN)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    return tmp_path


def _run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "bigtrain", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60)


def test_the_version_is_told(folder: Path) -> None:
    done = _run(folder, "--version")

    assert (done.returncode, done.stdout) == (0, "bigtrain 0.1.0\n")


@pytest.mark.parametrize(
    "arguments", [("--help",), ("launch", "--help"), ("plan", "-h"), ("inspect", "-h")]
)
def test_help_answers_at_once(folder: Path, arguments: tuple[str, ...]) -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)

    done = _run(folder, *arguments)

    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0
    assert done.stdout.startswith("Usage: bigtrain")
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.5


def test_help_shows_examples_line_by_line(folder: Path) -> None:
    assert (
        "  Examples:\n"
        "    bigtrain launch configs/quickstart.yaml --procs-per-node 2\n"
        "    bigtrain launch run.yaml --engine zero3 --set training.max_steps=100\n"
        "    bigtrain launch train.py --procs-per-node 4 -- --learning-rate 1e-4\n"
    ) in _run(folder, "launch", "--help").stdout


def test_mistyped_commands_and_flags_are_answered_with_the_nearest(folder: Path) -> None:
    command, flag = _run(folder, "lanch"), _run(folder, "launch", "quick.yaml", "--engin", "fsdp")

    assert (command.returncode, flag.returncode) == (2, 2)
    assert "No such command 'lanch'.\nDid you mean 'launch'?\n" in command.stderr
    assert "No such option: --engin" in flag.stderr
    assert "--engine" in flag.stderr


def test_a_scripts_own_arguments_are_told_apart_in_the_answer(folder: Path) -> None:
    done = _run(folder, "launch", "train.py", "--lr", "1e-4", "a b")

    assert done.returncode == 2
    assert done.stderr.endswith(
        "\nA script's own arguments come after bigtrain's and --, as in: "
        "bigtrain launch train.py --procs-per-node 2 -- --lr 1e-4\n"
    )


def test_a_mistyped_word_for_resuming_is_answered_with_the_nearest(folder: Path) -> None:
    done = _run(folder, "launch", "quick.yaml", "--resume", "atuo")

    assert done.stderr == "error: resume: there is no 'atuo' here; did you mean 'auto'?\n"


@pytest.mark.parametrize("command", ["launch", "plan"])
def test_one_fault_is_one_line_and_no_traceback(folder: Path, command: str) -> None:
    done = _run(folder, command, "quik.yaml")

    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: quik.yaml: there is no such file; did you mean quick.yaml?\n"


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (ConfigError("a\nb\x1b[31m\r\u202e"), "error: a\\nb\\x1b[31m\\r\\u202e"),
        (ConfigError(["a\x07", "ü…\n"]), "error: 2 faults\n  a\\x07\n  ü…\\n"),
        (
            ConfigError(f"--set hf_{'aB3' * 11}: hf_llama_finetune_v2 is no value"),
            "error: --set hf_…: hf_llama_finetune_v2 is no value",
        ),
        (LaunchError("first\x1b]0;\nsecond"), "error: first\\x1b]0;\nsecond"),
    ],
)
def test_what_a_terminal_would_obey_is_shown(error: BigtrainError, text: str) -> None:
    assert error_text(error) == text


def test_several_faults_are_a_list_with_their_origins(folder: Path) -> None:
    done = _run(
        folder, "launch", "quick.yaml", "--engine", "fsdpp", "--set", "training.max_stps=3",
        "--procs-per-node", "0", "--env", "HF_TOKEN=abc", "--start", "slow",
    )  # fmt: skip

    assert done.returncode == 2
    assert done.stderr == (
        "error: 5 faults\n"
        "  --set: training.max_stps: unknown key; did you mean 'max_steps'?\n"
        "  flag --engine: engine.name: 'fsdpp' is not one of auto, single, ddp, fsdp, zero1, "
        "zero2, zero3; did you mean 'fsdp'?\n"
        "  flag --env: cluster.env.HF_TOKEN: a secret's value must not be written into a plan; "
        "export it where bigtrain is started, and every rank inherits it\n"
        "  flag --procs-per-node: cluster.procs_per_node: 0 is too small; it must be at least 1\n"
        "  flag --start: cluster.start: 'slow' is not one of fork, fresh\n"
    )
    assert "abc" not in done.stderr


def test_what_can_not_be_written_is_told_before_anything_starts(folder: Path) -> None:
    refused = _run(folder, "launch", "quick.yaml", "--output-dir", "/proc/x", "--dry-run")
    told = _run(folder, "plan", "quick.yaml", "--output-dir", "/proc/x")
    cache = _run(folder, "launch", "quick.yaml", "--set", "data.cache_dir=/proc/x")

    why = "output_dir: /proc/x: nothing can be made in /proc (No such file or directory)"
    assert refused.stderr == f"error: flag --output-dir: {why}; give another --output-dir\n"
    assert (told.returncode, why in told.stdout) == (0, True)
    assert cache.stderr == (
        "error: --set: data.cache_dir: /proc/x can't be used: nothing can be made in /proc "
        "(No such file or directory); give a directory that you may write to\n"
    )
    assert [entry.name for entry in folder.iterdir()] == ["quick.yaml"]


def test_a_flag_for_a_number_says_so(folder: Path) -> None:
    done = _run(folder, "launch", "quick.yaml", "--max-restarts", "x")
    assert "Invalid value for '--max-restarts': 'x' is not a whole number" in done.stderr


def test_a_fault_of_a_script_s_flags_names_the_separator(folder: Path) -> None:
    (folder / "train.py").write_text("")

    done = _run(folder, "plan", "train.py", "--set", "training.seed=3")

    assert done.stderr == (
        "error: --set: training.seed: a script sets this itself: give it to the script, after --\n"
    )


def test_faults_are_json_too_when_json_is_asked_for(folder: Path) -> None:
    done = _run(folder, "launch", "quick.yaml", "--engine", "fsdpp", "--json")

    assert done.returncode == 2
    assert json.loads(done.stdout)["kind"] == "failure"
    assert done.stderr == ""


def test_a_dry_run_shows_the_plan_and_every_command_and_leaves_nothing(folder: Path) -> None:
    done = _run(folder, "launch", "quick.yaml", "--procs-per-node", "2", "--dry-run")

    assert done.returncode == 0
    assert "processes      2 on cpu, 1 thread each" in done.stdout
    assert "training.bf16             true                 quick.yaml:6" in done.stdout
    assert "RANK=1 LOCAL_RANK=1 WORLD_SIZE=2" in done.stdout
    assert [entry.name for entry in folder.iterdir()] == ["quick.yaml"]


def test_a_plan_in_json_is_the_plan(folder: Path) -> None:
    done = _run(folder, "plan", "quick.yaml", "--nodes", "4", "--procs-per-node", "8", "--json")

    shown = json.loads(done.stdout)
    forecast = shown.pop("forecast")
    assert (shown.pop("missing"), shown.pop("refused")) == ([], [])
    plan = RunPlan.from_json(json.dumps(shown))
    assert plan.topology.world_size == 32
    assert plan.origins["engine.name"].startswith("auto: ")
    assert forecast["memory"]["peak"] > 0
    assert plan.origins["cluster.nodes"] == "flag --nodes"


def test_a_plan_tells_values_engine_and_fates(folder: Path) -> None:
    shown = _run(folder, "plan", "quick.yaml", "--procs-per-node", "2", "--engine", "zero2").stdout

    assert "global batch   16 sequences = 8 × 1 micro-batches × 2 processes\n" in shown
    assert "tokens a step  2,048 at most\n" in shown
    assert "engine.name" in shown
    assert "flag --engine" in shown
    lines = [" ".join(line.split()) for line in shown.splitlines()]
    assert "zero_optimization.stage 2" in lines
    assert "bf16 true mapped bf16.enabled = true" in lines
    assert not [line for line in lines if line.startswith("fp16_backend")]
    assert "at their defaults; --all shows them" in lines[-1]


def test_a_plan_of_all_arguments_tells_those_at_their_defaults_too(folder: Path) -> None:
    shown = _run(folder, "plan", "quick.yaml", "--all").stdout

    lines = [" ".join(line.split()) for line in shown.splitlines()]
    assert (
        "fp16_backend auto no_effect removed upstream: PyTorch's own mixed precision is the only "
        "one"
    ) in lines
    assert "at their defaults" not in lines[-1]


def test_a_script_is_planned_with_its_arguments(folder: Path) -> None:
    (folder / "train.py").write_text("import transformers\n")

    asked = ("train.py", "--engine", "zero3", "--procs-per-node", "2", "--output-dir", "logs")
    shown = _run(folder, "plan", *asked, "--", "--model", "a b").stdout

    lines = [" ".join(line.split()) for line in shown.splitlines()]
    assert f"script {folder}/train.py --model 'a b'" in lines
    assert (
        f"output {folder}/logs (flag --output-dir: plan and logs; "
        "the script's own output goes where it says)"
    ) in lines
    assert "cluster.env.ACCELERATE_DEEPSPEED_CONFIG_FILE" in shown
    assert "gradient_clipping as the script says" in lines
    sharded = _run(folder, "plan", "train.py", "--engine", "fsdp", "--set", "training.bf16=true")
    rows = [" ".join(line.split()) for line in sharded.stdout.splitlines()]
    assert "precision bf16, masters fp32, reduced in bf16" in rows  # by accelerate


def test_planning_imports_no_torch_and_takes_no_time(folder: Path) -> None:
    code = (
        "import sys; from bigtrain.cli import app\n"
        "app(['plan', 'quick.yaml', '--procs-per-node', '2'], standalone_mode=False)\n"
        "assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)\n"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)

    subprocess.run([sys.executable, "-c", code], cwd=folder, check=True, capture_output=True)

    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1.0


def test_a_script_is_launched_with_its_arguments_and_its_exit_code(folder: Path) -> None:
    (folder / "train.py").write_text(
        "import os, sys\nprint(os.environ['RANK'], sys.argv[1:])\nsys.exit(7)\n"
    )

    done = _run(folder, "launch", "train.py", "--output-dir", "out", "--", "--lr", "1", "--help")

    assert done.returncode == 7
    assert "0 ['--lr', '1', '--help']\n" in done.stdout
    assert read_plan(folder / "out/plans/attempt-01.json").script_args == ("--lr", "1", "--help")
    assert "Traceback" not in done.stderr


def test_what_a_failed_save_does_is_a_flag(folder: Path) -> None:
    right = _run(folder, "launch", "quick.yaml", "--on-save-failure", "continue", "--dry-run")
    wrong = _run(folder, "launch", "quick.yaml", "--on-save-failure", "maybe", "--dry-run")

    assert right.returncode == 0
    assert "on_save_failure" in right.stdout
    assert wrong.returncode == 2
    assert "on_save_failure" in wrong.stderr
    assert "stop" in wrong.stderr


def test_an_output_directory_that_cannot_be_made_is_named(folder: Path) -> None:
    (folder / "file").write_text("")

    done = _run(folder, "launch", "quick.yaml", "--output-dir", "file/sub")

    assert done.returncode != 0
    assert done.stderr == (
        f"error: flag --output-dir: output_dir: {folder}/file/sub: {folder}/file is a file; give "
        "another --output-dir\n"
    )
