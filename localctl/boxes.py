"""Boxes xyxy, the objects in them, and who finds those."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

Box = tuple[float, float, float, float]
RELATIONS = ("to the left of", "to the right of", "above", "below")


@dataclass(frozen=True)
class Found:
    """An object: its label, its box xyxy in pixels, and how sure the detector is, in [0,1]."""

    label: str
    box: Box
    score: float = 1.0


class Detector(Protocol):
    """Finds objects in an image uint8 (H,W,3). ``labels``: what is asked for; a detector that always looks for the
    same may ignore it."""

    def __call__(self, image: np.ndarray, labels: Sequence[str]) -> list[Found]: ...


@dataclass(frozen=True)
class Truth:
    """What an image of known content shows, and who finds it.

    objects: by phrases of the caption, as ``find`` labels them. shapes: the same objects as ``find_shapes`` labels
    them, for conditions that have no colour. relation: (first, relation, second) where the caption states one; first
    and second are phrases.
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
    """Find the smallest box xyxy in pixels around what is at least half as full as the fullest pixel of ``mask``
    (H,W)."""
    ys, xs = (mask >= mask.max() / 2).nonzero()
    return float(xs.min()), float(ys.min()), float(xs.max() + 1), float(ys.max() + 1)


def holds(relation: str, first: tuple[float, float], second: tuple[float, float]) -> bool:
    """Tell whether one of ``RELATIONS`` is true of two centres (x, y): the named axis decides the sign, with no
    margin."""
    axis, sign = {RELATIONS[0]: (0, -1), RELATIONS[1]: (0, 1), RELATIONS[2]: (1, -1), RELATIONS[3]: (1, 1)}[relation]
    return (first[axis] - second[axis]) * sign > 0
