"""How many GPUs the ranks will see on this machine, found without importing torch.

Asking torch would start CUDA in the launcher, which no process that forks may do.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Mapping
from pathlib import Path

_DEVICES = Path("/dev")


def count_gpus(environment: Mapping[str, str], *, devices: Path = _DEVICES) -> int:
    """NVIDIA GPUs here that the installed torch can use and `environment` doesn't hide."""
    if not _torch_has_cuda():
        return 0
    present = sum(1 for entry in devices.glob("nvidia[0-9]*") if entry.name[6:].isdigit())
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    return present if visible is None else min(present, _visible(visible))


def _visible(variable: str) -> int:
    """How many devices `CUDA_VISIBLE_DEVICES` names: CUDA stops reading at the first bad one."""
    count = 0
    for name in variable.split(","):
        if not re.fullmatch(r"\d+|GPU-[\w-]+|MIG-[\w/-]+", name.strip()):
            break
        count += 1
    return count


def _torch_has_cuda() -> bool:
    """Whether the installed torch was built for CUDA: its `version.py` says for which."""
    spec = importlib.util.find_spec("torch")  # finds a top-level package without running it
    if spec is None or spec.origin is None:
        return False
    try:
        text = (Path(spec.origin).parent / "version.py").read_text(encoding="utf-8")
    except OSError:
        return False
    return re.search(r"^cuda\b[^=]*=\s*['\"]", text, re.MULTILINE) is not None
