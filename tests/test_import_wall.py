"""Everything left of the torch wall can be imported where there is no torch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import bigtrain

_ROOT = Path(bigtrain.__file__).parent
_BEHIND_THE_WALL = ("torch", "transformers", "accelerate", "deepspeed", "numpy", "datasets")
_LEFT = (
    "__init__.py",
    "errors.py",
    "topology.py",
    "run_file.py",
    "small_files.py",
    "layers.py",
    "sections.py",
    "run_config.py",
    "run_inputs.py",
    "data/__init__.py",
    "data/[fs]*.py",
    "plan.py",
    "plan_report.py",
    "plan_command.py",
    "plan_diff.py",
    "memory_report.py",
    # All of memory but `answers` and `live_bytes`, which run in processes that have torch.
    "memory/__init__.py",
    "memory/a[cd]*.py",
    "memory/[b-km-z]*.py",
    "cli.py",
    "share.py",
    "console.py",
    "arguments/**/*.py",
    "translate/**/*.py",
    "planning/**/*.py",
    "cluster/**/*.py",
    "slurm/**/*.py",
    "cluster_flags.py",
    "launch_command.py",
    "run_commands.py",
    "checkpoint/__init__.py",
    "checkpoint/index.py",
    "checkpoint/formats/**/*.py",
    "checkpoint/manifest.py",
    "checkpoint/staging.py",
    "checkpoint/find.py",
    "checkpoint/foreign.py",
    "checkpoint/inspect.py",
    "checkpoint/inspect_command.py",
    "checkpoint/writer.py",
    "checkpoint/verify.py",
    "checkpoint/torch_file.py",
    "checkpoint/source.py",
    "checkpoint/consolidate/**/*.py",
    "checkpoint/consolidate_command.py",
)
_IMPORT_ALL = """
import importlib, sys

class Wall:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked}:
            raise ImportError(f"{{name}} is behind the torch wall")

sys.meta_path.insert(0, Wall())
for module in {modules}:
    try:
        importlib.import_module(module)
    except ImportError as error:
        print(f"{{module}}: {{error}}")
"""


def _modules() -> list[str]:
    files = [file for pattern in _LEFT for file in sorted(_ROOT.glob(pattern))]
    names = (file.relative_to(_ROOT.parent).with_suffix("").parts for file in files)
    return [".".join(name).removesuffix(".__init__") for name in names]


def test_nothing_left_of_the_torch_wall_imports_what_is_behind_it() -> None:
    modules = _modules()
    code = _IMPORT_ALL.format(blocked=set(_BEHIND_THE_WALL), modules=modules)

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert len(modules) > 40
    assert done.stdout == ""


def test_every_part_of_the_list_is_there() -> None:
    assert [pattern for pattern in _LEFT if not list(_ROOT.glob(pattern))] == []
