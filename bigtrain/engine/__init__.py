"""Engines: one way each of training a model on all ranks, behind one protocol.

`protocol` is what the training loop knows; `build_engine` is the only place that knows engines by
name. This package's door imports no torch, so that its pure parts can be used without it.
"""

from __future__ import annotations

from bigtrain.engine.factory import build_engine

__all__ = ["build_engine"]
