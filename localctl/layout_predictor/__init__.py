"""Predict a layout from a prompt: find its objects, and predict their boxes (arXiv 2304.03869)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from localctl.lazy import lazy_names

if TYPE_CHECKING:
    from localctl.layout_predictor.model import LayoutPredictor as LayoutPredictor
    from localctl.layout_predictor.model import load_predictor as load_predictor
    from localctl.layout_predictor.parsing import PromptObject as PromptObject
    from localctl.layout_predictor.parsing import parse as parse

__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        "model": ["LayoutPredictor", "load_predictor"],
        "parsing": ["PromptObject", "parse"],
    },
)
