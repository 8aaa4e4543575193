"""Whether objects stand where they were asked for, in the relation that was asked for, and nowhere they were hidden."""

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
    @property
    def box(self) -> Box: ...


class _Detected(PerSample):
    """A metric of what a detector finds. detector: None is deprecated, and means the reader of micro scenes."""

    _reader = "micro_detector"

    def __init__(self, detector: Detector | None, threshold: float = 0.5, hit: str = "") -> None:
        super().__init__()
        if not 0 < threshold <= 1:
            raise ValueError(f"The IoU that counts as {hit} must be in (0, 1], not {threshold}.")
        self.detector: Detector = detector or getattr(detection, self._reader)
        self.threshold = threshold


class RegionAccuracy(_Detected):
    """Phrases found in their regions, one row per region.

    ``accuracy``: 1 where a detection of the phrase overlaps the box with IoU >= ``threshold``. ``iou``: that of the
    best match, 0 where there is none. ``iou_found``: the same, undefined where there is none. ``coverage``: 1 where
    there is one anywhere. Read the last two together: a detector that rarely finds anything flatters ``iou_found``.
    """

    columns = ("accuracy", "iou", "iou_found", "coverage")
    higher_is_better = True

    def __init__(self, detector: Detector | None = None, threshold: float = 0.5) -> None:
        super().__init__(detector, threshold, "a hit")

    def update(self, image: np.ndarray, regions: Sequence[Found]) -> None:
        """``image``: uint8 (H,W,3). ``regions``: phrases with their boxes in pixels of it."""
        check_image(image)
        found = self.detector(image, [region.label for region in regions])
        for match in best_matches(regions, found):
            iou = match or 0.0
            self.add((float(iou >= self.threshold), iou, math.nan if match is None else iou, float(match is not None)))


class RelationAccuracy(_Detected):
    """Whether an image shows the relation that its caption states (as VISOR, arXiv 2212.10015), one row per relation.

    ``both``: both objects are there. ``accuracy``: and some pair of them stands in the relation. ``accuracy_of_both``:
    the same, undefined where one is missing.
    """

    columns = ("both", "accuracy", "accuracy_of_both")
    higher_is_better = True

    def __init__(self, detector: Detector | None = None, relation: Callable[[str, Point, Point], bool] = holds) -> None:
        super().__init__(detector)
        self.relation = relation

    def update(self, image: np.ndarray, first: str, relation: str, second: str) -> None:
        """``image``: uint8 (H,W,3); ``first`` stands in ``relation`` ("to the left of", "above" ...) to ``second``.
        A pair is two detections: one alone stands in no relation to itself."""
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
    """Objects of the condition that were hidden by the mask and are reproduced all the same, against the base.

    ``leak``: share of the hidden objects found in the image at their place (IoU >= ``threshold``), less the same in
    the image that the base generates from the same noise without any adapter. ``reproduced``: without that difference.
    A sample without hidden objects is undefined.
    """

    columns = ("leak", "reproduced")
    higher_is_better = False

    _reader = "micro_shapes"

    def __init__(self, detector: Detector | None = None, threshold: float = 0.5) -> None:
        super().__init__(detector, threshold, "reproduced")

    def update(self, image: np.ndarray, base: np.ndarray, hidden: Sequence[Found]) -> None:
        """``image``, ``base``: uint8 (H,W,3), with and without the adapter. ``hidden``: labels and boxes in pixels."""
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
    """Choose those of ``objects``, with boxes in pixels, that lie wholly at least ``margin`` pixels outside the mask
    ``inside``, bool (H,W)."""
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
