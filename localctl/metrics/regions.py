"""Measure whether objects are in their regions and relations, and whether hidden objects leak into the image."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

import numpy as np

from localctl.boxes import Box, Detector, Found, holds
from localctl.metrics import detection
from localctl.metrics.detection import best_matches, same_label
from localctl.metrics.per_sample import PerSample

Point = tuple[float, float]
Placed = TypeVar("Placed", bound="HasBox")


class HasBox(Protocol):
    """Anything with a box, xyxy."""

    @property
    def box(self) -> Box: ...


class _Detected(PerSample):
    """A metric of detected objects. detector: None is deprecated, and means the reader of micro scenes."""

    _reader = "micro_detector"

    def __init__(self, detector: Detector | None, threshold: float = 0.5, hit: str = "") -> None:
        super().__init__()
        if not 0 < threshold <= 1:
            raise ValueError(f"The IoU that counts as {hit} must be in (0, 1], not {threshold}.")
        self.detector: Detector = detector or getattr(detection, self._reader)
        self.threshold = threshold


class RegionAccuracy(_Detected):
    """The accuracy of regions: whether each phrase is detected in its box. One row per region.

    ``accuracy``: 1 where a detection of the phrase overlaps the box with IoU >= ``threshold``. ``iou``: IoU of the best
    match, 0 where there is none. ``iou_found``: the same, but undefined where there is none. ``coverage``: 1 where the
    phrase is detected anywhere. Read the last two together: a detector that finds few objects has a high ``iou_found``.
    """

    columns = ("accuracy", "iou", "iou_found", "coverage")
    higher_is_better = True

    def __init__(self, detector: Detector | None = None, threshold: float = 0.5) -> None:
        super().__init__(detector, threshold, "a hit")

    def update(self, image: np.ndarray, regions: Sequence[Found]) -> None:
        """Add the regions of one image, uint8 (H,W,3): phrases with their boxes xyxy in pixels."""
        check_image(image)
        found = self.detector(image, [region.label for region in regions])
        for match in best_matches(regions, found):
            iou = match or 0.0
            self.add((float(iou >= self.threshold), iou, math.nan if match is None else iou, float(match is not None)))


class RelationAccuracy(_Detected):
    """Whether an image shows the relation that its caption states (VISOR, arXiv 2212.10015). One row per relation.

    ``both``: 1 where both objects are detected. ``accuracy``: 1 where moreover some pair of them has the relation.
    ``accuracy_of_both``: the same, but undefined where an object is missing.
    """

    columns = ("both", "accuracy", "accuracy_of_both")
    higher_is_better = True

    def __init__(self, detector: Detector | None = None, relation: Callable[[str, Point, Point], bool] = holds) -> None:
        super().__init__(detector)
        self.relation = relation

    def update(self, image: np.ndarray, first: str, relation: str, second: str) -> None:
        """Add the relation of one image.

        Args:
            image: uint8 (H,W,3).
            first, relation, second: as in "a red circle", "to the left of", "a blue star". Two labels that are equal
                need two detections.
        """
        check_image(image)
        found = self.detector(image, [first, second])
        pairs = [
            (_centre(a), _centre(b))
            for i, a in enumerate(found)
            for j, b in enumerate(found)
            if i != j and same_label(a.label, first) and same_label(b.label, second)
        ]
        right = any(self.relation(relation, *pair) for pair in pairs)
        self.add((float(bool(pairs)), float(right), float(right) if pairs else math.nan))


class Leak(_Detected):
    """The share of the condition's objects that are reproduced although the mask hides them.

    ``reproduced``: share of the hidden objects that are detected at their place in the image (IoU >= ``threshold``).
    ``leak``: this share minus the same share in the image that the base generates from the same noise without an
    adapter. Both are undefined for a sample without hidden objects.
    """

    columns = ("leak", "reproduced")
    higher_is_better = False

    _reader = "micro_shapes"

    def __init__(self, detector: Detector | None = None, threshold: float = 0.5) -> None:
        super().__init__(detector, threshold, "reproduced")

    def update(self, image: np.ndarray, base: np.ndarray, hidden: Sequence[Found]) -> None:
        """Add one sample.

        Args:
            image, base: uint8 (H,W,3), generated with and without the adapter.
            hidden: labels and boxes xyxy in pixels of the objects that the mask hides.
        """
        check_image(image)
        check_image(base)
        if not hidden:
            self.add((math.nan, math.nan))
            return
        share = self._share(image, hidden)
        self.add((share - self._share(base, hidden), share))

    def _share(self, image: np.ndarray, hidden: Sequence[Found]) -> float:
        matches = best_matches(hidden, self.detector(image, [item.label for item in hidden]))
        return float(np.mean([(match or 0.0) >= self.threshold for match in matches]))


def hidden_objects(objects: Sequence[Placed], inside: np.ndarray, margin: int = 8) -> list[Placed]:
    """Return the objects whose whole box, xyxy in pixels, is at least ``margin`` pixels away from the mask ``inside``,
    bool (H,W)."""
    found = []
    for item in objects:
        x0, y0, x1, y1 = item.box
        rows = slice(max(0, int(y0) - margin), math.ceil(y1) + margin)
        columns = slice(max(0, int(x0) - margin), math.ceil(x1) + margin)
        if not inside[rows, columns].any():
            found.append(item)
    return found


def _centre(item: Found) -> Point:
    return (item.box[0] + item.box[2]) / 2, (item.box[1] + item.box[3]) / 2


def check_image(image: np.ndarray) -> None:
    """Raise ValueError unless ``image`` is uint8 (H,W,3)."""
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"An image must be uint8 (H, W, 3), not {image.dtype} {image.shape}.")
