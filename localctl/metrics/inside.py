"""Measure how well an image follows its condition inside the mask: edges with a tolerance, structural similarity."""

from __future__ import annotations

import cv2
import numpy as np

from localctl.metrics.edges import edge_scores
from localctl.metrics.per_sample import PerMaskedImage

SSIM_SIGMA, SSIM_WINDOW = 1.5, 11
SSIM_K1, SSIM_K2 = 0.01, 0.03


class EdgeScore(PerMaskedImage):
    """Precision, recall and F1 of edges inside the mask (:func:`localctl.metrics.edges.edge_scores`).

    Samples with fewer than ``min_target`` target edge pixels inside the mask are undefined.
    """

    columns = ("precision", "recall", "f1")
    higher_is_better = True

    def __init__(self, tolerance_px: float = 2.0, min_target: int = 1) -> None:
        super().__init__()
        if not tolerance_px >= 0 or min_target < 1:
            raise ValueError(f"Need tolerance_px >= 0 and min_target >= 1, not {tolerance_px} and {min_target}.")
        self.tolerance_px, self.min_target = tolerance_px, min_target

    def score(self, prediction: np.ndarray, target: np.ndarray, mask: np.ndarray) -> tuple[float, ...]:
        """Score two edge maps inside a mask, uint8 (H,W) each; values above 127 count as edge or inside."""
        scores = edge_scores(prediction > 127, target > 127, mask > 127, self.tolerance_px, self.min_target)
        return scores.precision, scores.recall, scores.f1


def ssim_inside(prediction: np.ndarray, target: np.ndarray, mask: np.ndarray) -> float:
    """Compute the mean structural similarity (Wang et al. 2004, eq. 13) over the pixels inside a mask.

    Means, variances and covariance under the window (Gaussian, sigma 1.5, 11x11) use only its pixels inside the mask,
    so pixels outside cannot change the result.

    Args:
        prediction, target: (H,W) in [0,1].
        mask: bool (H,W).

    Returns:
        The mean, at most 1; NaN for an empty mask.
    """
    if not mask.any():
        return float("nan")
    weight = mask.astype(np.float64)
    total = np.maximum(_window(weight), 1e-12)  # > 0 wherever the mask is
    x, y = prediction.astype(np.float64), target.astype(np.float64)
    mean_x, mean_y, xx, yy, xy = (_window(weight * v) / total for v in (x, y, x * x, y * y, x * y))
    c1, c2 = SSIM_K1**2, SSIM_K2**2
    similarity = (2 * mean_x * mean_y + c1) * (2 * (xy - mean_x * mean_y) + c2)
    similarity /= (mean_x**2 + mean_y**2 + c1) * (xx - mean_x**2 + yy - mean_y**2 + c2)
    return float(similarity[mask].mean())


def _window(values: np.ndarray) -> np.ndarray:
    size = (SSIM_WINDOW, SSIM_WINDOW)
    return cv2.GaussianBlur(values, size, SSIM_SIGMA, borderType=cv2.BORDER_CONSTANT)


class SSIMInside(PerMaskedImage):
    """Structural similarity of two conditions inside the mask (:func:`ssim_inside`)."""

    columns = ("ssim",)
    higher_is_better = True

    def score(self, prediction: np.ndarray, target: np.ndarray, mask: np.ndarray) -> tuple[float, ...]:
        """Score two conditions inside a mask, uint8 (H,W) each."""
        return (ssim_inside(prediction / 255, target / 255, mask > 127),)
