"""Who finds objects in a picture: the embedded base's own reader, or any detection pipeline of transformers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import numpy as np
from PIL import Image
from scipy.optimize import linear_sum_assignment

from localctl.boxes import Box, box_iou
from localctl.micro.detect import Detection, detect


@dataclass(frozen=True)
class Found:
    """An object: its label, its box xyxy in pixels, and how sure the detector is, in [0,1]."""

    label: str
    box: Box
    score: float = 1.0


class Detector(Protocol):
    """Finds objects in a picture uint8 (H,W,3). ``labels``: what is asked for; a detector that always looks for the
    same may ignore it."""

    def __call__(self, image: np.ndarray, labels: Sequence[str]) -> list[Found]: ...


@lru_cache(maxsize=2)  # several metrics look at one image, or at it and that of the base, in turn
def _objects(pixels: bytes, shape: tuple[int, ...]) -> tuple[Detection, ...]:
    return detect(np.frombuffer(pixels, np.uint8).reshape(shape)).objects


def micro_detector(image: np.ndarray, labels: Sequence[str] = ()) -> list[Found]:
    """The reader of micro scenes; labels are phrases such as "red circle"."""
    return [Found(item.phrase, item.box, item.match) for item in _objects(image.tobytes(), image.shape)]


def micro_shapes(image: np.ndarray, labels: Sequence[str] = ()) -> list[Found]:
    """As :func:`micro_detector`; labels are shapes alone, such as "circle", for conditions that have no colour."""
    return [Found(item.shape, item.box, item.match) for item in _objects(image.tobytes(), image.shape)]


def transformers_detector(pipeline: Callable[..., Any], threshold: float = 0.1) -> Detector:
    """A ``transformers`` pipeline for ``object-detection`` or ``zero-shot-object-detection`` as a detector.

    ``pipeline``: called with a picture, and with ``candidate_labels`` if its ``task`` is zero-shot.
    """
    zero_shot = "zero-shot" in str(getattr(pipeline, "task", ""))

    def find(image: np.ndarray, labels: Sequence[str]) -> list[Found]:
        options: dict[str, Any] = {"candidate_labels": list(dict.fromkeys(labels))} if zero_shot else {}
        if zero_shot and not options["candidate_labels"]:
            return []
        results = pipeline(Image.fromarray(image), threshold=threshold, **options)
        corners = ("xmin", "ymin", "xmax", "ymax")
        return [
            Found(str(r["label"]), tuple(float(r["box"][corner]) for corner in corners), float(r["score"]))  # type: ignore[arg-type]
            for r in results
        ]

    return find


def same_label(a: str, b: str) -> bool:
    """Whether two labels name one thing, whatever their case and spacing."""
    return a.casefold().split() == b.casefold().split()


def best_matches(wanted: Sequence[Found], found: Sequence[Found]) -> list[float | None]:
    """The IoU of each wanted object with the detection of its label assigned to it; None where none is left.

    Every detection serves one wanted object, such that the sum of IoU is largest: the order of detections is
    irrelevant.
    """
    result: list[float | None] = [None] * len(wanted)
    if not wanted or not found:
        return result
    fits = np.array([[same_label(w.label, f.label) for f in found] for w in wanted])
    overlap = np.array([[box_iou(w.box, f.box) for f in found] for w in wanted])
    # A detection of another label costs more than all overlaps together could gain.
    rows, columns = linear_sum_assignment(np.where(fits, 1 + overlap, -len(wanted) * 2.0), maximize=True)
    for row, column in zip(rows, columns, strict=True):
        if fits[row, column]:
            result[row] = float(overlap[row, column])
    return result
