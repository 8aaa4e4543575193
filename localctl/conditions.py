"""Conditions: control images, float (C,H,W) in [0,1], computed from an image or read from the data."""

from __future__ import annotations

from typing import TYPE_CHECKING

import cv2
import numpy as np
from PIL import Image

from localctl.condition_models import compute
from localctl.settings import FROM_IMAGE as FROM_IMAGE
from localctl.settings import MODELS, ConditionConfig

if TYPE_CHECKING:  # torch is imported where it is used
    from torch import Tensor


def extract(config: ConditionConfig, image: np.ndarray) -> Tensor:
    """Compute the condition (C,H,W) float32 in [0,1] of ``image``, uint8 RGB (H,W,3), at the image's own size.

    Scales are fixed, never normalised per image, so that equal edges have equal values in every image.
    But depth, of which models know no scale, goes from 0 to 1 in every image. ValueError for kinds that cannot be
    computed from an image (column, and depth etc. without a model), a model that cannot be loaded, and for another
    shape or dtype.
    """
    if not config.from_image:
        model = f", or set condition.model, for example to {MODELS[config.kind]}" if config.kind in MODELS else ""
        raise ValueError(
            f"A {config.kind} condition cannot be computed from an image; pass it as a condition image instead{model}."
        )
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or image.size == 0:
        raise ValueError(f"A condition needs an RGB image uint8 (H, W, 3), not {image.dtype} {image.shape}.")
    image = np.ascontiguousarray(image)
    if config.model is not None:
        condition = compute(config, [image])[0]  # (H,W,C)
    elif config.kind == "palette":
        make = _palette if config.palette_filter == "mean" else _resized_palette
        condition = make(image, config.cells)  # (H,W,3)
    elif config.kind == "canny":
        source = image if config.channels_used == "rgb" else cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
        condition = cv2.Canny(source, config.low, config.high)[..., None].astype(np.float32) / 255  # (H,W,1)
    else:
        condition = _sobel(image)[..., None]  # (H,W,1)
    import torch

    return torch.from_numpy(np.ascontiguousarray(condition.transpose(2, 0, 1), dtype=np.float32))


def _sobel(image: np.ndarray) -> np.ndarray:
    """Compute the gradient magnitude (H,W) in [0,1]: 1 for a straight step from black to white; corners of full
    contrast are clipped to 1."""
    gray = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY).astype(np.float32) / 255
    dx, dy = (
        cv2.Sobel(gray, cv2.CV_32F, *order, ksize=3, borderType=cv2.BORDER_REPLICATE) for order in ((1, 0), (0, 1))
    )
    return np.hypot(dx, dy).clip(0, 4) / 4


def _palette(image: np.ndarray, cells: int) -> np.ndarray:
    """Replace each pixel by the mean colour of its cell: (H,W,3) in [0,1]."""
    height, width = image.shape[:2]
    row_starts, row_cell = _split(height, cells)
    column_starts, column_cell = _split(width, cells)
    sums = np.add.reduceat(np.add.reduceat(image.astype(np.float64), row_starts, axis=0), column_starts, axis=1)
    counts = np.outer(np.bincount(row_cell), np.bincount(column_cell))[..., None]
    return (sums / counts / 255)[row_cell][:, column_cell]


def _resized_palette(image: np.ndarray, cells: int) -> np.ndarray:
    """Resize the image to cells x cells by bicubic interpolation, and back: (H,W,3) in [0,1], in steps of 1/255."""
    height, width = image.shape[:2]
    small = Image.fromarray(image).resize((cells, cells), Image.Resampling.BICUBIC)
    return np.asarray(small.resize((width, height), Image.Resampling.NEAREST), dtype=np.float32) / 255


def _split(length: int, cells: int) -> tuple[np.ndarray, np.ndarray]:
    """Split pixels into ``cells`` nearly equal parts, none empty; return their starts, and each pixel's part."""
    part = np.arange(length) * min(cells, length) // length
    return np.flatnonzero(np.diff(part, prepend=-1)), part
