"""The wheel that `pip install .` makes, in an environment and a directory of its own."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "-d", directory]
    subprocess.run(command, cwd=CHECKOUT, check=True, capture_output=True, timeout=120)
    return next(directory.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The `bin` of an environment that holds this wheel; its dependencies are borrowed."""
    home = tmp_path_factory.mktemp("environment")
    venv.create(home, with_pip=False, symlinks=True)
    python = home / "bin" / "python"
    command = [sys.executable, "-m", "pip", "--python", python, "install", "--no-deps"]
    subprocess.run(
        [*command, "--no-index", "--quiet", wheel], check=True, capture_output=True, timeout=120
    )
    # As a path and not as a site directory: the checkout's editable install stays out of sight.
    borrowed = sysconfig.get_paths()["purelib"]
    own = next((home / "lib").glob("python3*/site-packages"))
    (own / "borrowed.pth").write_text(f"{borrowed}\n")
    return home / "bin"


def run(command: list[object], directory: Path) -> str:
    done = subprocess.run(
        [str(part) for part in command],
        cwd=directory,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_it_holds_one_package_and_what_users_copy(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()

    assert {name.split("/")[0].partition("-")[0] for name in names} == {"bigtrain"}
    for needed in (
        "bigtrain/py.typed",
        "bigtrain/_share/configs/quickstart.yaml",
        "bigtrain/_share/launch/train.py",
        "bigtrain/_share/slurm/train.sbatch",
    ):
        assert needed in names
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_its_files_are_found_from_another_directory(installed: Path, tmp_path: Path) -> None:
    code = "from bigtrain import share; print(share.bundled('quickstart.yaml'))"

    found = run([installed / "python", "-c", code], tmp_path).strip()

    assert Path(found).is_relative_to(installed.parent)


def test_it_plans_a_bundled_run_from_another_directory(installed: Path, tmp_path: Path) -> None:
    run([installed / "bigtrain", "plan", "configs/quickstart.yaml"], tmp_path)
    dry = run([installed / "bigtrain", "launch", "quickstart.yaml", "--dry-run"], tmp_path)

    assert "fsdp" in dry
    assert not (tmp_path / "runs").exists()


def test_it_trains_from_another_directory(installed: Path, tmp_path: Path) -> None:
    run(
        [
            installed / "bigtrain",
            "launch",
            "quickstart.yaml",
            *("--set", "model.config.hidden_size=32", "--set", "model.config.intermediate_size=64"),
            *("--set", "training.max_steps=2", "--set", "training.eval_strategy=no"),
            *("--set", "training.eval_on_start=false", "--set", "data.max_samples=5"),
            *("--output-dir", "out"),
        ],
        tmp_path,
    )

    assert (tmp_path / "out" / "model.safetensors").is_file()
