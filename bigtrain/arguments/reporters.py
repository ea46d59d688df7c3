"""The names that `report_to` may have, read from the installed transformers without importing it.

It looks them up when the Trainer is made (transformers/integrations/integration_utils.py).
"""

from __future__ import annotations

import importlib.util
import re
from functools import lru_cache
from pathlib import Path

_TABLE = re.compile(r"^INTEGRATION_TO_CALLBACK = \{(.*?)^\}", re.MULTILINE | re.DOTALL)


@lru_cache(maxsize=1)
def reporters() -> tuple[str, ...]:
    """All of them; empty where they can't be read."""
    spec = importlib.util.find_spec("transformers")
    if spec is None or spec.origin is None:
        return ()
    try:
        text = (Path(spec.origin).parent / "integrations/integration_utils.py").read_text("utf-8")
    except OSError:
        return ()
    table = _TABLE.search(text)
    return tuple(re.findall(r'^\s*"(\w+)":', table[1], re.MULTILINE)) if table else ()
