"""From a sentence to a layout: find the objects of a prompt, and predict where they belong (arXiv 2304.03869)."""

from __future__ import annotations

import importlib
from typing import Any

_PUBLIC = {
    "LayoutPredictor": "localctl.layout_predictor.model",
    "PromptObject": "localctl.layout_predictor.parsing",
    "load_predictor": "localctl.layout_predictor.model",
    "parse": "localctl.layout_predictor.parsing",
}
__all__ = sorted(_PUBLIC)


def __getattr__(name: str) -> Any:
    """Load public names on first use: parsing alone needs no torch."""
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'localctl.layout_predictor' has no attribute {name!r}")
