"""Compare edges inside a mask, with a tolerance in pixels (boundary matching as in BSDS and DAVIS)."""

import math
from dataclasses import dataclass

import cv2
import numpy as np

from localctl.conditions import ConditionConfig, extract

MIN_EDGES = 40  # target edge pixels inside the mask; an image with fewer is not scored
CANNY = ConditionConfig(kind="canny", low=50, high=100)  # for every adapter, whatever condition it was trained on
_WIDEST = 8  # pixels; up to here, a dilation is faster than distances
YARDSTICK = {"kind": CANNY.kind, "low": CANNY.low, "high": CANNY.high, "tolerance_px": 2.0, "min_target": MIN_EDGES}


def canny(image: np.ndarray) -> np.ndarray:
    """Extract the edges of an image uint8 (H, W, 3) with the thresholds of ``CANNY``: bool (H, W)."""
    return extract(CANNY, image)[0].numpy() > 0.5


@dataclass(frozen=True)
class EdgeScores:
    """Scores in [0,1], NaN where undefined, and numbers of edge pixels inside the mask."""

    precision: float
    recall: float
    f1: float
    n_target: int
    n_prediction: int

    @property
    def defined(self) -> bool:
        """False when the target had too few edges inside the mask; leave such a sample out, and report the number."""
        return not math.isnan(self.f1)


def edge_scores(
    prediction: np.ndarray, target: np.ndarray, mask: np.ndarray, tolerance_px: float = 2, min_target: int = 1
) -> EdgeScores:
    """Measure precision, recall and F1 of predicted edges inside a mask.

    Precision is the share of predicted edge pixels inside the mask that have a target edge pixel within
    ``tolerance_px`` (Euclidean distance). Recall is the same with prediction and target swapped. The counted pixels lie
    inside the mask. Their partners need not, as otherwise an edge along the border of the mask would be lost by a shift
    of one pixel. Several pixels may have the same partner.

    A prediction without edges inside the mask has precision 0 and F1 0, so that it counts in a mean.

    Args:
        prediction, target, mask: bool (H,W).
        tolerance_px: largest distance of a match, in pixels.
        min_target: with fewer target pixels inside the mask, all three scores are NaN.

    Raises:
        ValueError: the shapes differ or are not (H,W), the tolerance is negative, or min_target < 1.
    """
    if min_target < 1:
        raise ValueError(f"Need min_target >= 1, not {min_target}.")
    matched, missed, invented = match_edges(prediction, target, mask, tolerance_px)
    n_matched, n_prediction = int(matched.sum()), int(matched.sum() + invented.sum())
    n_target = int((np.asarray(target).astype(bool) & np.asarray(mask).astype(bool)).sum())
    if n_target < min_target:
        return EdgeScores(math.nan, math.nan, math.nan, n_target, n_prediction)
    precision = n_matched / max(n_prediction, 1)
    recall = (n_target - int(missed.sum())) / n_target
    f1 = 2 * precision * recall / (precision + recall) if precision + recall else 0.0
    return EdgeScores(precision, recall, f1, n_target, n_prediction)


def match_edges(
    prediction: np.ndarray, target: np.ndarray, mask: np.ndarray, tolerance_px: float = 2
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return where, inside the mask, predicted edges are matched, target edges are missed, and edges are invented.

    Arguments and matching as for :func:`edge_scores`. Each result is bool (H,W): matched and invented pixels are the
    predicted edges with and without a target edge within the tolerance; missed pixels are target edges without a
    predicted one.

    Raises:
        ValueError: the shapes differ or are not (H,W), or the tolerance is negative.
    """
    prediction, target, mask = (np.asarray(array).astype(bool) for array in (prediction, target, mask))
    if not prediction.shape == target.shape == mask.shape or mask.ndim != 2:
        raise ValueError(
            "Prediction, target and mask must have one shape (H, W), "
            f"not {prediction.shape}, {target.shape} and {mask.shape}."
        )
    if not tolerance_px >= 0:
        raise ValueError(f"Need tolerance_px >= 0, not {tolerance_px}.")
    near_target, near_prediction = _near(target, tolerance_px), _near(prediction, tolerance_px)
    return (
        prediction & mask & near_target,
        target & mask & ~near_prediction,
        prediction & mask & ~near_target,
    )


def _near(edges: np.ndarray, tolerance_px: float) -> np.ndarray:
    """Return the pixels that have a pixel of ``edges`` within the tolerance."""
    if not edges.any():
        return np.zeros_like(edges)
    limit = tolerance_px + 1e-4  # so that a tolerance of 8 ** 0.5 includes the diagonal
    if limit > _WIDEST:
        distance = cv2.distanceTransform((~edges).astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
        return np.asarray(distance <= limit)
    steps = np.arange(-int(limit), int(limit) + 1)
    disk = np.hypot(*np.meshgrid(steps, steps)) <= limit
    return cv2.dilate(edges.view(np.uint8), disk.astype(np.uint8)).view(bool)
