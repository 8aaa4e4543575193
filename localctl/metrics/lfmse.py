"""Compute LFMSE and DiffCC, the scores of arXiv 2602.01991, by their published formulas.

Neither ranks methods alone. ``out`` is the error against white outside the mask, so it is 0 for a white image, and an
all-white prediction has a perfect coincidence. Read ``in`` and the coincidence together with both hallucinations.
"""

from __future__ import annotations

import cv2
import numpy as np

from localctl.metrics.per_sample import PerMaskedImage

METHODS = ("canny", "sobel")
KERNEL, SIGMA, SHRINK = 11, 5.0, 8


def low_frequencies(image: np.ndarray) -> np.ndarray:
    """Blur uint8 (H,W) with an 11x11 Gaussian of sigma 5 and shrink it by 8: float64 (H//8, W//8) in [0,1]."""
    blurred = cv2.GaussianBlur(image, (KERNEL, KERNEL), SIGMA)
    return cv2.resize(blurred, _shrunk(image)) / 255.0


def shrunk_mask(mask: np.ndarray) -> np.ndarray:
    """Shrink a mask uint8 (H,W) by 8, nearest pixel: bool (H//8, W//8), true where it is not 0."""
    return cv2.resize(mask, _shrunk(mask), interpolation=cv2.INTER_NEAREST) > 0


def _shrunk(image: np.ndarray) -> tuple[int, int]:
    height, width = image.shape
    if min(height, width) < SHRINK:
        raise ValueError(f"An image of {width}x{height} pixels is too small; LFMSE and DiffCC shrink by {SHRINK}.")
    return width // SHRINK, height // SHRINK


def lfmse(
    prediction: np.ndarray, target: np.ndarray, mask: np.ndarray, method: str = "canny", wrapped: bool = False
) -> tuple[float, float]:
    """Compute the low-frequency mean squared error (in, out).

    ``in`` is the mean squared difference from the target inside the mask, ``out`` the mean squared difference from 1
    outside it. NaN where undefined.

    Args:
        prediction, target, mask: uint8 (H,W).
        method: ``canny`` compares low frequencies. ``sobel`` compares full images, each divided by its maximum (the
            target's within the mask), and is undefined where a maximum is 0.
        wrapped: compute sobel's ``out`` as the published code does. There, 1 - mask wraps around in uint8 and is
            nowhere 0, so ``out`` is measured over the whole image, from 1 plus the target inside the mask.
    """
    if method == "canny":
        inside = shrunk_mask(mask)
        wanted, found = low_frequencies(target), low_frequencies(prediction)
    else:
        inside = mask > 0
        visible = np.where(inside, target, 0)
        if not visible.any() or not prediction.any():  # the published code divides by zero
            return float("nan"), float("nan")
        wanted, found = visible / visible.max(), prediction / prediction.max()
        if wrapped:
            return _mean((found - wanted)[inside] ** 2), _mean((found - 1 - wanted) ** 2)
    return _mean((found - wanted)[inside] ** 2), _mean((found - 1)[~inside] ** 2)


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if values.size else float("nan")


def diff_cc(prediction: np.ndarray, target: np.ndarray, mask: np.ndarray) -> tuple[float, float, float]:
    """Compute (coincidence, hallucination inside, hallucination outside) on low frequencies; NaN where undefined.

    - coincidence: 1 - (cells inside where the target is brighter) / (cells inside where the target is not black)
    - hallucination inside: (cells inside where the prediction is brighter) / (cells inside)
    - hallucination outside: (cells outside where the prediction is not black) / (cells outside)

    Args:
        prediction, target, mask: uint8 (H,W).
    """
    inside = shrunk_mask(mask)
    low_target, low_prediction = low_frequencies(target), low_frequencies(prediction)
    missing = _share(inside & (low_target > low_prediction), inside & (low_target > 0))
    return (
        1 - missing,
        _share(inside & (low_prediction > low_target), inside),
        _share(~inside & (low_prediction > 0), ~inside),
    )


def _share(cells: np.ndarray, of: np.ndarray) -> float:
    return float(cells.sum() / of.sum()) if of.any() else float("nan")


class LFMSE(PerMaskedImage):
    """The low-frequency mean squared errors ``in``, ``out`` and ``tot`` = in + out (:func:`lfmse`).

    ValueError for an unknown method (``canny`` or ``sobel``), and for ``wrapped`` without sobel.
    """

    columns = ("in", "out", "tot")
    higher_is_better = False

    def __init__(self, method: str = "canny", wrapped: bool = False) -> None:
        super().__init__()
        if method not in METHODS:
            raise ValueError(f"Unknown LFMSE method {method!r}; choose one of {', '.join(METHODS)}.")
        if wrapped and method != "sobel":
            raise ValueError(f"wrapped applies to the LFMSE method 'sobel' only, not to {method!r}; leave it out.")
        self.method, self.wrapped = method, wrapped

    def score(self, prediction: np.ndarray, target: np.ndarray, mask: np.ndarray) -> tuple[float, ...]:
        inside, outside = lfmse(prediction, target, mask, self.method, self.wrapped)
        return inside, outside, inside + outside


class DiffCC(PerMaskedImage):
    """Coincidence and hallucination of low-frequency edges (:func:`diff_cc`)."""

    columns = ("coincidence", "hallucination_in", "hallucination_out")

    def score(self, prediction: np.ndarray, target: np.ndarray, mask: np.ndarray) -> tuple[float, ...]:
        return diff_cc(prediction, target, mask)
