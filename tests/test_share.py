from __future__ import annotations

import pytest

from bigtrain import share
from bigtrain.errors import ConfigError


def test_bundled_files_are_found_by_path_and_by_name() -> None:
    by_path = share.bundled("configs/quickstart.yaml")

    assert by_path is not None
    assert by_path.is_file()
    assert share.bundled("quickstart.yaml") == by_path
    assert share.bundled("train.py") == share.share_root() / "launch" / "train.py"


@pytest.mark.parametrize("name", ["../pyproject.toml", "/etc/hostname", "tests/conftest.py", "x"])
def test_nothing_outside_the_shared_folders_is_found(name: str) -> None:
    assert share.bundled(name) is None


def test_what_is_not_bundled_is_refused_with_what_is() -> None:
    with pytest.raises(ConfigError, match=r"configs/quickstart\.yaml, .*launch/train\.py"):
        share.bundled_file("quikstart.yaml")
