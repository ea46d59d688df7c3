"""The random number generators that a training draws from, saved and restored together."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch


def state(device: torch.device) -> dict[str, Any]:
    """The states of Python's, numpy's, torch's and the device's generators, as transformers
    keeps them in `rng_state.pth`."""
    states: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "cpu": torch.random.get_rng_state(),
    }
    if device.type == "cuda":
        states["cuda"] = torch.cuda.random.get_rng_state(device)
    return states


def restore(states: Mapping[str, Any], device: torch.device) -> None:
    """Put the generators where `state` found them."""
    random.setstate(_tuples(states["python"]))
    np.random.set_state(states["numpy"])
    torch.random.set_rng_state(states["cpu"])
    if device.type == "cuda" and "cuda" in states:
        own = states["cuda"]
        # transformers' distributed runs save the generators of all of a node's GPUs.
        if isinstance(own, (list, tuple)):
            own = own[device.index or 0]
        torch.cuda.random.set_rng_state(own, device)


def derive(*, seed: int, step: int, rank: int, device: torch.device) -> None:
    """Put the generators where they follow from the run's seed, the step and this rank alone."""
    digest = hashlib.sha256(f"{seed}/{step}/{rank}".encode()).digest()
    value = int.from_bytes(digest[:4], "little")
    random.seed(value)
    np.random.seed(value)
    torch.default_generator.manual_seed(value)
    if device.type == "cuda":
        torch.cuda.manual_seed(value)


def _tuples(value: Any) -> Any:
    return tuple(_tuples(item) for item in value) if isinstance(value, (list, tuple)) else value
