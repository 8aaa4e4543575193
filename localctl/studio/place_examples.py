"""Scenes to begin with, one click away: for the embedded base in its own words, for other bases in everyone's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from localctl.bases import same_base
from localctl.studio.canvas import scene

Box = tuple[float, float, float, float]
# Name -> the prompt, and the box of each of its phrases.
_MICRO: Mapping[str, tuple[str, Mapping[str, Box]]] = {
    "Two objects": (
        "a red circle and a blue star on a gray background",
        {"a red circle": (0.05, 0.2, 0.45, 0.7), "a blue star": (0.55, 0.3, 0.95, 0.8)},
    ),
    "One above the other": (
        "a green triangle and a yellow square",
        {"a green triangle": (0.3, 0.04, 0.7, 0.44), "a yellow square": (0.3, 0.54, 0.7, 0.94)},
    ),
    "Three in a row": (
        "a red square, a green circle and a purple ring",
        {
            "a red square": (0.02, 0.3, 0.32, 0.7),
            "a green circle": (0.35, 0.3, 0.65, 0.7),
            "a purple ring": (0.68, 0.3, 0.98, 0.7),
        },
    ),
}
_PHOTOS: Mapping[str, tuple[str, Mapping[str, Box]]] = {
    "Two animals": (
        "a photo of a black cat and a white rabbit sitting in the grass",
        {"a black cat": (0.05, 0.3, 0.48, 0.95), "a white rabbit": (0.54, 0.4, 0.95, 0.95)},
    ),
    "A landscape": (
        "an oil painting of a snowy mountain, a wooden cabin and a lake at sunset",
        {
            "a snowy mountain": (0.1, 0.05, 0.95, 0.5),
            "a wooden cabin": (0.05, 0.45, 0.35, 0.72),
            "a lake": (0.0, 0.72, 1.0, 1.0),
        },
    ),
    "A table": (
        "a bowl of oranges, a blue vase with flowers and a candle on a wooden table",
        {
            "a bowl of oranges": (0.03, 0.5, 0.4, 0.85),
            "a blue vase with flowers": (0.38, 0.1, 0.7, 0.85),
            "a candle": (0.76, 0.35, 0.92, 0.85),
        },
    ),
}


def examples(base: str) -> Mapping[str, tuple[str, Mapping[str, Box]]]:
    """Return the scenes that suit a base, by name."""
    return _MICRO if same_base(base, "micro") else _PHOTOS


def example_scene(base: str, name: str, size: tuple[int, int]) -> tuple[str, dict[str, Any]]:
    """Return the prompt and the value of the canvas of an example, at ``size`` = (height, width)."""
    prompt, boxes = examples(base)[name]
    return prompt, scene(size, [{"phrase": phrase, "box": list(box)} for phrase, box in boxes.items()])
