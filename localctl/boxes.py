"""Boxes xyxy, the objects in them, and the protocol of detectors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

Box = tuple[float, float, float, float]
RELATIONS = ("to the left of", "to the right of", "above", "below")


@dataclass(frozen=True)
class Found:
    """A detected object: its label, its box xyxy in pixels, and the detector's confidence in [0,1]."""

    label: str
    box: Box
    score: float = 1.0


class Detector(Protocol):
    """Detects objects in an image uint8 (H,W,3). ``labels``: the labels to look for; a detector with fixed labels may
    ignore them."""

    def __call__(self, image: np.ndarray, labels: Sequence[str]) -> list[Found]: ...


@dataclass(frozen=True)
class Truth:
    """The objects in an image of known content, and the detectors for them.

    objects: labelled by phrases of the caption, as by ``find``. shapes: the same objects with the labels of
    ``find_shapes``, for conditions without colour. relation: (phrase, relation, phrase) if the caption states one.
    """

    objects: tuple[Found, ...]
    shapes: tuple[Found, ...]
    relation: tuple[str, str, str] | None
    find: Detector
    find_shapes: Detector


def box_iou(a: Box, b: Box) -> float:
    """Compute the intersection over union of two boxes xyxy; 0 when both are empty."""
    overlap = max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    union = sum(max(0.0, box[2] - box[0]) * max(0.0, box[3] - box[1]) for box in (a, b)) - overlap
    return overlap / union if union > 0 else 0.0


def box_around(mask: np.ndarray) -> Box:
    """Return the smallest box xyxy in pixels around the pixels of ``mask`` (H,W) that are at least half its maximum."""
    ys, xs = (mask >= mask.max() / 2).nonzero()
    return float(xs.min()), float(ys.min()), float(xs.max() + 1), float(ys.max() + 1)


def holds(relation: str, first: tuple[float, float], second: tuple[float, float]) -> bool:
    """Return whether one of ``RELATIONS`` is true of two centres (x, y). It compares one coordinate, without margin."""
    axis, sign = {RELATIONS[0]: (0, -1), RELATIONS[1]: (0, 1), RELATIONS[2]: (1, -1), RELATIONS[3]: (1, 1)}[relation]
    return (first[axis] - second[axis]) * sign > 0
