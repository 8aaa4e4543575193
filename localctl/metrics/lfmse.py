"""LFMSE and DiffCC, the scores of arXiv 2602.01991, by their published formulas but as numbers.

Neither ranks methods by itself. "out" is the error against white everywhere outside the mask, so a white image has
none; an all-white prediction has a perfect coincidence. Read ``in`` and the coincidence beside both hallucinations.
"""

from __future__ import annotations

import cv2
import numpy as np

from localctl.metrics.per_sample import PerMaskedImage

METHODS = ("canny", "sobel")
KERNEL, SIGMA, SHRINK = 11, 5.0, 8


def low_frequencies(image: np.ndarray) -> np.ndarray:
    """Blur uint8 (H,W) by 11x11 of sigma 5 and shrink it by 8: float64 (H//8, W//8) in [0,1]."""
    blurred = cv2.GaussianBlur(image, (KERNEL, KERNEL), SIGMA)
    return cv2.resize(blurred, _shrunk(image)) / 255.0


def shrunk_mask(mask: np.ndarray) -> np.ndarray:
    """Shrink uint8 (H,W) -> bool (H//8, W//8), nearest pixel, true where anything is controlled."""
    return cv2.resize(mask, _shrunk(mask), interpolation=cv2.INTER_NEAREST) > 0


def _shrunk(image: np.ndarray) -> tuple[int, int]:
    height, width = image.shape
    if min(height, width) < SHRINK:
        raise ValueError(f"An image of {width}x{height} pixels is too small; LFMSE and DiffCC shrink by {SHRINK}.")
    return width // SHRINK, height // SHRINK


def lfmse(
    prediction: np.ndarray, target: np.ndarray, mask: np.ndarray, method: str = "canny", wrapped: bool = False
) -> tuple[float, float]:
    """Compute (in, out) of uint8 (H,W) each; NaN where undefined.

    in: mean squared difference to the target inside the mask. out: to 1 outside it. canny compares low frequencies;
    sobel the full images, each over its own maximum (the target's within the mask), undefined where that is 0.
    wrapped: of sobel's ``out``, as in the published code, whose 1 - mask wraps round in uint8 and is nowhere 0: over
    the whole image, to 1 plus what the target has inside.
    """
    if method == "canny":
        inside = shrunk_mask(mask)
        wanted, found = low_frequencies(target), low_frequencies(prediction)
    else:
        inside = mask > 0
        visible = np.where(inside, target, 0)
        if not visible.any() or not prediction.any():  # the published form divides by zero
            return float("nan"), float("nan")
        wanted, found = visible / visible.max(), prediction / prediction.max()
        if wrapped:
            return _mean((found - wanted)[inside] ** 2), _mean((found - 1 - wanted) ** 2)
    return _mean((found - wanted)[inside] ** 2), _mean((found - 1)[~inside] ** 2)


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if values.size else float("nan")


def diff_cc(prediction: np.ndarray, target: np.ndarray, mask: np.ndarray) -> tuple[float, float, float]:
    """Compute (coincidence, hallucination inside, hallucination outside) of uint8 (H,W) each; NaN where undefined.

    All on the low frequencies: 1 - cells inside where the target is brighter / cells inside where the target is not
    black; cells inside where the prediction is brighter / cells inside; cells outside where it is not black / cells
    outside.
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
    """Measure the low-frequency mean squared error, ``in``, ``out`` and ``tot`` = in + out, as :func:`lfmse`.

    ValueError for an unknown method (``canny`` or ``sobel``), and for ``wrapped`` without sobel.
    """

    columns = ("in", "out", "tot")
    higher_is_better = False

    def __init__(self, method: str = "canny", wrapped: bool = False) -> None:
        super().__init__()
        if method not in METHODS:
            raise ValueError(f"Unknown LFMSE method {method!r}; choose one of {', '.join(METHODS)}.")
        if wrapped and method != "sobel":
            raise ValueError(f"wrapped is of LFMSE's sobel alone, not of {method}; leave it out.")
        self.method, self.wrapped = method, wrapped

    def score(self, prediction: np.ndarray, target: np.ndarray, mask: np.ndarray) -> tuple[float, ...]:
        inside, outside = lfmse(prediction, target, mask, self.method, self.wrapped)
        return inside, outside, inside + outside


class DiffCC(PerMaskedImage):
    """Measure coincidence and hallucination of low-frequency edges, as :func:`diff_cc`."""

    columns = ("coincidence", "hallucination_in", "hallucination_out")

    def score(self, prediction: np.ndarray, target: np.ndarray, mask: np.ndarray) -> tuple[float, ...]:
        return diff_cc(prediction, target, mask)
