"""How well a picture follows its condition inside the mask: edges with a tolerance, and structural similarity."""

from __future__ import annotations

import cv2
import numpy as np
from torch import Tensor

from localctl.metrics.edges import edge_scores
from localctl.metrics.per_sample import PerSample, gray_batches

SSIM_SIGMA, SSIM_WINDOW = 1.5, 11
SSIM_K1, SSIM_K2 = 0.01, 0.03


class EdgeScore(PerSample):
    """Precision, recall and F1 of edges inside the mask, as :func:`localctl.metrics.edges.edge_scores`.

    Samples with fewer than ``min_target`` target edge pixels inside the mask are undefined.
    """

    columns = ("precision", "recall", "f1")
    higher_is_better = True

    def __init__(self, tolerance_px: float = 2.0, min_target: int = 1) -> None:
        super().__init__()
        if not tolerance_px >= 0 or min_target < 1:
            raise ValueError(f"Need tolerance_px >= 0 and min_target >= 1, not {tolerance_px} and {min_target}.")
        self.tolerance_px, self.min_target = tolerance_px, min_target

    def update(self, prediction: np.ndarray | Tensor, target: np.ndarray | Tensor, mask: np.ndarray | Tensor) -> None:
        """Edge maps and masks of one shape, (H,W), (B,H,W) or (B,1,H,W), uint8 or [0,1], cut at one half. ValueError
        otherwise."""
        for found, wanted, region in zip(*gray_batches(prediction=prediction, target=target, mask=mask), strict=True):
            scores = edge_scores(found > 127, wanted > 127, region > 127, self.tolerance_px, self.min_target)
            self.add((scores.precision, scores.recall, scores.f1))


def ssim_inside(prediction: np.ndarray, target: np.ndarray, mask: np.ndarray) -> float:
    """Mean structural similarity (Wang et al. 2004, eq. 13) over the pixels of ``mask`` (bool (H,W)), or NaN if empty.

    prediction, target: (H,W) in [0,1]. Means, variances and the covariance under the window (Gaussian, sigma 1.5,
    11x11) are taken over its pixels inside the mask alone, so what lies outside cannot change the result.
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


class SSIMInside(PerSample):
    """Structural similarity of the picture's condition and the one asked for, inside the mask (:func:`ssim_inside`)."""

    columns = ("ssim",)
    higher_is_better = True

    def update(self, prediction: np.ndarray | Tensor, target: np.ndarray | Tensor, mask: np.ndarray | Tensor) -> None:
        """Conditions of one channel (edges, depth, gray) and masks, as for :class:`EdgeScore`."""
        for images in zip(*gray_batches(prediction=prediction, target=target, mask=mask), strict=True):
            self.add((ssim_inside(images[0] / 255, images[1] / 255, images[2] > 127),))
