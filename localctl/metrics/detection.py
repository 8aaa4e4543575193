"""Make a detector of a transformers pipeline, and match detections with wanted objects."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from PIL import Image
from scipy.optimize import linear_sum_assignment

from localctl.boxes import Detector as Detector
from localctl.boxes import Found as Found
from localctl.boxes import box_iou
from localctl.lazy import moved_names

_MICRO = {"micro_detector": "localctl.micro.detect:find_objects", "micro_shapes": "localctl.micro.detect:find_shapes"}
__getattr__ = moved_names(__name__, _MICRO)


def transformers_detector(pipeline: Callable[..., Any], threshold: float = 0.1) -> Detector:
    """Make a detector of a ``transformers`` pipeline for ``object-detection`` or ``zero-shot-object-detection``.

    Args:
        pipeline: called with an image, and with ``candidate_labels`` if its ``task`` is zero-shot.
        threshold: lowest score of a detection, in [0, 1].
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
    """Tell whether two labels are equal apart from case and spacing."""
    return a.casefold().split() == b.casefold().split()


def best_matches(wanted: Sequence[Found], found: Sequence[Found]) -> list[float | None]:
    """Return, for each wanted object, its IoU with the detection assigned to it; None where none is assigned.

    Labels must be equal, and each detection is assigned to at most one object. The assignment maximises the sum of IoU,
    so the order of the detections does not matter.
    """
    result: list[float | None] = [None] * len(wanted)
    if not wanted or not found:
        return result
    fits = np.array([[same_label(w.label, f.label) for f in found] for w in wanted])
    overlap = np.array([[box_iou(w.box, f.box) for f in found] for w in wanted])
    # A pair with different labels costs more than all overlaps together could gain.
    rows, columns = linear_sum_assignment(np.where(fits, 1 + overlap, -len(wanted) * 2.0), maximize=True)
    for row, column in zip(rows, columns, strict=True):
        if fits[row, column]:
            result[row] = float(overlap[row, column])
    return result
