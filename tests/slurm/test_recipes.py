"""The recipes that users copy: each, with --dry-run, against the text it must lead to."""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from bigtrain.share import share_root

GOLDEN = Path(__file__).with_name("golden")
RUN = """\
name: tiny
output_dir: /data/runs/tiny
model:
  config: {model_type: llama, hidden_size: 64}
tokenizer: {kind: bytes}
data: {name: builtin:python-docs, sequence_length: 128}
engine: fsdp
cluster: {slurm: {python: /opt/venv/bin/python}}
"""
RECIPES = ["launch/slurm.sh", "launch/slurm_sweep.sh", "launch/slurm_container.sh"]
NODE_BY_HAND = ["launch/two_machines.sh", "slurm/own_script.sbatch"]


def _dry_run(
    recipe: str | Path, folder: Path, *words: str, run: str = RUN, **environment: str
) -> str:
    (folder / "run.yaml").write_text(run)
    done = subprocess.run(
        ["bash", str(share_root() / recipe), "run.yaml", "--dry-run", *words],
        cwd=folder,
        env={
            "PATH": f"{_commands(folder)}:/usr/bin:/bin",
            "HOME": str(folder),
            "PWD": str(folder),
            **environment,
        },
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def _commands(folder: Path) -> Path:
    """`bigtrain`, and an srun that runs the command once, as a step of one task does."""
    place = folder / "bin"
    place.mkdir(exist_ok=True)
    for name, text in {
        "bigtrain": f'exec {sys.executable} -m bigtrain "$@"',
        "srun": 'while [[ $1 = --* ]]; do shift; done; exec "$@"',
    }.items():
        (place / name).write_text(f"#!/bin/bash\n{text}\n")
        (place / name).chmod(0o755)
    return place


def _without_places(script: str, folder: Path) -> str:
    package = re.escape(str(share_root()))
    script = re.sub(rf"^  {package}$", "  /opt/site-packages", script, flags=re.M)
    return script.replace(str(folder), "/home/me/work")


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_for_slurm_leads_to_the_golden_script(recipe: str, tmp_path: Path) -> None:
    text = _without_places(_dry_run(recipe, tmp_path, IMAGE="registry/image:1"), tmp_path)

    assert text == (GOLDEN / f"recipe_{Path(recipe).stem}.sbatch").read_text()


@pytest.mark.parametrize("recipe", NODE_BY_HAND)
def test_a_recipe_for_a_node_leads_to_the_golden_commands(recipe: str, tmp_path: Path) -> None:
    environment = {"PROCS": "2", "NODE_RANK": "1", "HEAD": "machine0:29400", "OMP_NUM_THREADS": "1"}

    text = _dry_run(recipe, tmp_path, "--set", "training.use_cpu=true", **environment)

    commands = text.partition("\nCommands\n")[2].replace(sys.executable, "/opt/venv/bin/python")
    commands = re.sub(rf"( on |-){re.escape(platform.node())}(,|\n)", r"\1machine\2", commands)
    commands = re.sub(r"  imported once: .*\n", "", commands)  # what an engine needs is its own
    assert commands == (GOLDEN / f"recipe_{Path(recipe).stem}.txt").read_text()


def test_the_example_of_the_documentation_leads_to_the_golden_script(tmp_path: Path) -> None:
    text = (Path(__file__).parents[2] / "docs" / "slurm.md").read_text()
    command = text.partition("```\n")[2].partition("\n```")[0]
    section = text.partition("```yaml\n")[2].partition("```")[0]
    assert command.startswith("bigtrain launch RUN.yaml --slurm ")
    recipe = command.replace("RUN.yaml", '"$1"') + ' "${@:2}"\n'
    (tmp_path / "recipe.sh").write_text(recipe)

    run = RUN.replace("cluster: {slurm: {python: /opt/venv/bin/python}}\n", section)
    words = ("--sbatch", "python=/opt/venv/bin/python", "--sbatch", "cpus_per_task=64")
    script = _without_places(_dry_run(tmp_path / "recipe.sh", tmp_path, *words, run=run), tmp_path)

    assert script == (GOLDEN / "documentation.sbatch").read_text()


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="no shellcheck")
def test_shellcheck_has_nothing_to_say_of_the_recipes() -> None:
    files = sorted([*share_root().glob("launch/*.sh"), *share_root().glob("slurm/*.sbatch")])
    assert len(files) == 7
    done = subprocess.run(["shellcheck", *files], capture_output=True, text=True, check=False)
    assert done.stdout == ""
