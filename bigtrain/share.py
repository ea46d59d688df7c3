"""Where the files lie that a user copies and edits: run files, scripts, job templates.

A checkout has them at its root; a wheel carries them inside the package.
"""

from __future__ import annotations

from pathlib import Path

from bigtrain.errors import ConfigError

FOLDERS = ("configs", "launch", "slurm")
_PACKAGE = Path(__file__).resolve().parent


def share_root() -> Path:
    """The directory that holds `configs/` and `launch/`."""
    # Asked for by pyproject.toml too: in site-packages, any other package may have a `configs`.
    if (_PACKAGE.parent / "pyproject.toml").is_file() and (_PACKAGE.parent / "configs").is_dir():
        return _PACKAGE.parent
    return _PACKAGE / "_share"


def bundled(name: str) -> Path | None:
    """The bundled file that `name` means: `configs/quickstart.yaml`, or `quickstart.yaml`."""
    root = share_root()
    asked = Path(name)
    if asked.is_absolute() or ".." in asked.parts:
        return None
    if len(asked.parts) > 1:
        places = [root / asked] if asked.parts[0] in FOLDERS else []
    else:
        places = [root / folder / asked for folder in FOLDERS]
    return next((place for place in places if place.is_file()), None)


def bundled_file(name: str) -> Path:
    """As `bundled`, but a ConfigError that lists what there is where nothing has that name."""
    path = bundled(name)
    if path is None:
        raise ConfigError(f"{name} is not bundled; there are {', '.join(bundled_names())}")
    return path


def bundled_names() -> list[str]:
    """Every bundled file, as `folder/name`."""
    root = share_root()
    return sorted(
        str(path.relative_to(root))
        for folder in FOLDERS
        for path in (root / folder).glob("*")
        if path.is_file() and not path.name.startswith((".", "__"))
    )
