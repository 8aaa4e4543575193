"""Metrics that keep the values of every sample."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat


class PerSample(Metric):
    """A metric with one value per sample in each of ``columns``; NaN = undefined for this sample.

    ``compute`` returns the mean of every column over the samples where it is defined, and as ``undefined_{column}`` the
    number of samples where it is not. ``per_sample`` returns the values, for intervals and paired comparisons.
    """

    columns: ClassVar[tuple[str, ...]]
    is_differentiable = False
    full_state_update = False
    values: list[Tensor] | Tensor

    def __init__(self) -> None:
        super().__init__()
        # Flat and of one dtype, so that processes without samples can be synchronised.
        self.set_dtype(torch.float64)
        self.add_state("values", default=[], dist_reduce_fx="cat")

    def add(self, *rows: tuple[float, ...]) -> None:
        """Add one row per sample, in the order of ``columns``."""
        assert all(len(row) == len(self.columns) for row in rows)
        assert isinstance(self.values, list)
        self.values.append(torch.tensor(rows, dtype=torch.float64).flatten())  # (n * k,)

    def per_sample(self) -> np.ndarray:
        """Return all values, (n, k) float64, NaN where undefined; only those of this process unless synchronised."""
        empty = isinstance(self.values, list) and not self.values
        flat = torch.empty(0) if empty else dim_zero_cat(self.values)
        return flat.cpu().double().numpy().reshape(-1, len(self.columns))

    def compute(self) -> dict[str, float]:
        """Compute means, numbers of undefined samples, and the number ``n`` of samples. ValueError for no sample."""
        table = self.per_sample()
        if not len(table):
            raise ValueError(f"{type(self).__name__} has no samples; call update first.")
        result: dict[str, float] = {}
        for name, column in zip(self.columns, table.T, strict=True):
            defined = column[~np.isnan(column)]
            result[name] = float(defined.mean()) if len(defined) else float("nan")
            result[f"undefined_{name}"] = len(column) - len(defined)
        return result | {"n": len(table)}


class PerMaskedImage(PerSample):
    """Compare a prediction with its target inside a mask."""

    def score(self, prediction: np.ndarray, target: np.ndarray, mask: np.ndarray) -> tuple[float, ...]:
        """Compute the values of one sample, in the order of ``columns``, from uint8 (H,W) each."""
        raise NotImplementedError

    def update(self, prediction: np.ndarray | Tensor, target: np.ndarray | Tensor, mask: np.ndarray | Tensor) -> None:
        """Add samples: edge maps or other one-channel conditions, and their masks.

        prediction, target, mask: (H,W), (B,H,W) or (B,1,H,W), all of one shape; uint8, bool, or float in [0,1].
        ValueError for other shapes and values.
        """
        for images in zip(*gray_batches(prediction=prediction, target=target, mask=mask), strict=True):
            self.add(self.score(*images))


def gray_batch(what: str, image: np.ndarray | Tensor) -> np.ndarray:
    """Convert a gray image, mask or condition, or a batch of them, to uint8 (B,H,W).

    ``image``: (H,W), (B,H,W) or (B,1,H,W); uint8, or bool, or float in [0,1]. ValueError for anything else.
    """
    array = image.detach().cpu().numpy() if isinstance(image, Tensor) else np.asarray(image)
    if array.ndim == 4 and array.shape[1] == 1:
        array = array[:, 0]
    array = array[None] if array.ndim == 2 else array
    if array.ndim != 3 or array.size == 0:
        raise ValueError(f"The {what} must be (H, W), (B, H, W) or (B, 1, H, W), not {array.shape}.")
    if array.dtype == np.bool_:
        return array.astype(np.uint8) * 255
    return _to_bytes(f"The {what} must be uint8, bool", array)


def gray_batches(**images: np.ndarray | Tensor) -> list[np.ndarray]:
    """Convert several batches as :func:`gray_batch` does. ValueError when their shapes differ."""
    arrays = {name: gray_batch(name, image) for name, image in images.items()}
    if len({array.shape for array in arrays.values()}) > 1:
        shapes = ", ".join(f"{name} {array.shape}" for name, array in arrays.items())
        raise ValueError(f"All images must have one shape (B, H, W), not {shapes}.")
    return list(arrays.values())


def rgb_batch(images: np.ndarray | Tensor) -> np.ndarray:
    """Convert RGB images to uint8 (B,H,W,3).

    ``images``: uint8 or float in [0,1]; (B,H,W,3) or (B,3,H,W), or either without B. ValueError for anything else:
    scale pixels in [-1,1] to [0,1] first.
    """
    array = images.detach().cpu().numpy() if isinstance(images, Tensor) else np.asarray(images)
    array = array[None] if array.ndim == 3 else array
    if array.ndim == 4 and array.shape[-1] != 3 and array.shape[1] == 3:
        array = array.transpose(0, 2, 3, 1)
    if array.ndim != 4 or array.shape[-1] != 3 or array.size == 0:
        raise ValueError(f"Images must be RGB of one size, (B, H, W, 3) or (B, 3, H, W), not {array.shape}.")
    return _to_bytes("Images must be uint8", array)


def _to_bytes(must: str, array: np.ndarray) -> np.ndarray:
    if array.dtype == np.uint8:
        return array
    if not np.issubdtype(array.dtype, np.floating) or not (array.min() >= 0 and array.max() <= 1):
        raise ValueError(f"{must}, or float with all values in [0, 1]; the given {array.dtype} array is not.")
    return np.round(array * 255).astype(np.uint8)
