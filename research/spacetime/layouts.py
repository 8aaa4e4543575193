"""Where the layouts of held-out captions come from: the scenes themselves, or a prediction from the caption alone."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from localctl.evaluation import LAYOUTS as LAYOUTS
from localctl.layout import Layout, Region
from localctl.micro.scenes import SIZE, Scene, article

_PREDICTOR = "localctl.layout_predictor"


def true_layout(item: Scene) -> Layout:
    """The caption with the boxes of the scene's objects, each described as "a red circle"."""
    regions = []
    for one in item.objects:
        x0, y0, x1, y1 = (value / SIZE for value in one.box)
        regions.append(Region(one.phrase, (x0, y0, x1, y1), prompt=article(one.phrase)))
    return Layout(item.caption, SIZE, SIZE, tuple(regions))


def layout_source(name: str, folder: str | None = None) -> Callable[[Scene, int], Layout]:
    """From a scene and a seed to the layout to draw, ``true`` or ``auto``.

    ``folder``: of the predictor for ``auto``; None = the weights that come along. ValueError when there is none.
    """
    if name not in LAYOUTS:
        raise ValueError(f"Unknown layouts {name!r}; choose one of {', '.join(LAYOUTS)}.")
    if name == "true":
        return lambda item, seed: true_layout(item)
    predictor = _load_predictor(folder)
    return lambda item, seed: replace(predictor.predict(item.caption, seed=seed), height=SIZE, width=SIZE)


def _load_predictor(folder: str | None) -> Any:
    if importlib.util.find_spec(_PREDICTOR) is None:
        raise ValueError("This version of localctl has no layout predictor; use the layouts of the scenes, true.")
    return importlib.import_module(_PREDICTOR).load_predictor(folder)
