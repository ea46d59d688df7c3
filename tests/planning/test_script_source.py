"""Ranks are forked only where the script couldn't tell the difference."""

from __future__ import annotations

from pathlib import Path

import pytest

from bigtrain.errors import ConfigError
from bigtrain.planning.script_source import ScriptFacts, read_script


def _facts(folder: Path, text: str, **beside: str) -> ScriptFacts:
    for name, content in beside.items():
        (folder / f"{name}.py").write_text(content)
    script = folder / "train.py"
    script.write_text(text)
    return read_script(script)


def test_the_libraries_of_a_script_are_preloaded(tmp_path: Path) -> None:
    text = (
        "import os, json\n"
        "import torch.nn as nn\n"
        "from transformers import Trainer, AutoTokenizer\n"
        "try:\n"
        "    import numpy\n"
        "except ImportError:\n"
        "    numpy = None\n"
        "def late():\n"
        "    import datasets\n"
    )

    assert _facts(tmp_path, text) == ScriptFacts(
        preload=(
            "torch.nn",
            "transformers",
            "transformers.trainer",
            "transformers.models.auto.tokenization_auto",
            "numpy",
        )
    )


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ("os.environ['A'] = '1'", "sets an environment variable"),
        ("os.environ.setdefault('A', '1')", "sets an environment variable"),
        ("environ.update(A='1')", "sets an environment variable"),
        ("del os.environ['A']", "sets an environment variable"),
        ("if True: os.putenv('A', '1')", "sets an environment variable"),
        ("x = load_dotenv()", "sets environment variables"),
        ("sys.path.insert(0, 'vendored')", "changes where modules are found"),
        ("sys.path += ['vendored']", "changes where modules are found"),
        ("sys.modules['torch'] = None", "changes where modules are found"),
    ],
)
def test_what_an_import_could_see_needs_fresh_interpreters(
    tmp_path: Path, line: str, what: str
) -> None:
    facts = _facts(tmp_path, f"import os, sys\n{line}\nimport torch\n")

    assert facts == ScriptFacts(preload=(), fresh_reason=f"train.py:2 {what} before its imports")


@pytest.mark.parametrize(
    "text",
    [
        "import torch\nimport os\nos.environ['A'] = '1'\n",
        "import os\ndef main():\n    os.environ['A'] = '1'\nimport torch\n",
        "import os\nhome = os.environ['HOME']\nlevel = os.environ.get('L')\nimport torch\n",
        "import torch\nif __name__ == '__main__':\n    import os\n    os.environ['A'] = '1'\n",
    ],
)
def test_what_no_import_could_see_does_not(tmp_path: Path, text: str) -> None:
    assert _facts(tmp_path, text) == ScriptFacts(preload=("torch",))


def test_a_module_beside_the_script_is_looked_into(tmp_path: Path) -> None:
    facts = _facts(
        tmp_path,
        "import setup_env\nimport torch\n",
        setup_env="import inner\n",
        inner="import os\nos.environ['A'] = '1'\n",
    )

    assert facts.fresh_reason == "inner.py:2 sets an environment variable before its imports"


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("import os\ndef setup():\n    os.environ['A'] = '1'\nsetup()\nimport torch\n", 3),
        (
            "import os\ndef inner():\n    os.putenv('A', '1')\ndef setup():\n    inner()\n"
            "x = [setup()]\nimport torch\n",
            3,
        ),
        (
            "import os\ndef main():\n    os.environ['A'] = '1'\n    import torch\n"
            "if __name__ == '__main__':\n    main()\n",
            3,
        ),
        ("import os\nmatch 1:\n    case 1:\n        os.environ['A'] = '1'\nimport torch\n", 4),
        ("import os\nclass A:\n    os.environ['A'] = '1'\nimport torch\n", 3),
    ],
)
def test_functions_that_are_called_are_looked_into(tmp_path: Path, text: str, line: int) -> None:
    reason = f"train.py:{line} sets an environment variable before its imports"

    assert _facts(tmp_path, text) == ScriptFacts(preload=(), fresh_reason=reason)


def test_a_function_of_a_module_beside_the_script_is_looked_into(tmp_path: Path) -> None:
    setup = "import os\ndef prepare():\n    os.environ['A'] = '1'\n"
    reason = "setup_env.py:3 sets an environment variable before its imports"

    for text in (
        "from setup_env import prepare\nprepare()\nimport torch\n",
        "from setup_env import prepare as p\np()\nimport torch\n",
        "import setup_env\nsetup_env.prepare()\nimport torch\n",
    ):
        assert _facts(tmp_path, text, setup_env=setup).fresh_reason == reason
    unused = _facts(tmp_path, "import setup_env\nimport torch\n", setup_env=setup)
    assert unused == ScriptFacts(preload=("torch",))


def test_what_a_called_function_imports_is_preloaded(tmp_path: Path) -> None:
    text = "def main():\n    import torch\n    main()\nmain()\n"

    assert _facts(tmp_path, text).preload == ("torch",)


def test_a_module_that_hides_an_installed_one_needs_fresh_interpreters(tmp_path: Path) -> None:
    facts = _facts(tmp_path, "import torch\n", datasets="")

    assert facts.fresh_reason == "datasets beside the script hides the installed module"


def test_modules_that_import_each_other_are_no_trap(tmp_path: Path) -> None:
    facts = _facts(tmp_path, "import a\nimport torch\n", a="import b\n", b="import a\n")

    assert facts.preload == ("torch",)


def test_a_script_that_is_not_python_is_refused_with_its_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as raised:
        _facts(tmp_path, "import torch\nx = = 3\n")

    assert str(raised.value) == f"{tmp_path}/train.py:2: not Python: invalid syntax"

    with pytest.raises(ConfigError, match=r"train\.py: not Python: .* null bytes"):
        _facts(tmp_path, "import torch\0")
