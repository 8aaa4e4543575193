"""Joint geometry: an image and everything that belongs to it are scaled, cropped and mirrored alike.

The crop is kept in shares of the image's sides, so that a condition or mask of another size is cut at the same place.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image

IMAGE, SMOOTH, NEAREST = Image.Resampling.LANCZOS, Image.Resampling.BILINEAR, Image.Resampling.NEAREST


@dataclass(frozen=True)
class Geometry:
    """Which part of an image is seen, as shares of its sides, and whether mirrored; at what size (height, width)."""

    left: float
    top: float
    right: float
    bottom: float
    flip: bool
    size: tuple[int, int]

    @property
    def view(self) -> str:
        """Name what is seen: equal for equal geometries only."""
        return f"{self.left!r} {self.top!r} {self.right!r} {self.bottom!r} {self.flip:d} {self.size[0]}x{self.size[1]}"

    def origin(self, source: tuple[int, int]) -> tuple[int, int]:
        """Find where the crop begins (top, left) in an image of ``source`` (h, w), mirrored if it is, on the scale of
        ``size``."""
        scale = max(self.size[0] / source[0], self.size[1] / source[1])
        left = 1 - self.right if self.flip else self.left
        return round(self.top * scale * source[0]), round(left * scale * source[1])

    def apply(self, image: Image.Image, resample: Image.Resampling) -> Image.Image:
        """Crop, scale and mirror ``image``, of any size and Pillow's modes L, RGB or F."""
        width, height = image.size
        box = (self.left * width, self.top * height, self.right * width, self.bottom * height)
        seen = image.resize((self.size[1], self.size[0]), resample, box)
        return seen.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if self.flip else seen

    def apply_to_mask(self, mask: np.ndarray) -> np.ndarray:
        """Do the same with ``mask`` (h,w) float, of any size: each pixel of the result (H,W) is the exact mean over the
        area it covers, where Pillow's box filter takes or leaves whole pixels and moves edges by up to half of one."""
        rows = _means(mask, self.top, self.bottom, self.size[0])
        seen = _means(rows.T, self.left, self.right, self.size[1]).T
        return np.ascontiguousarray(seen[:, ::-1] if self.flip else seen, dtype=np.float32)


def geometry(
    source: tuple[int, int], size: tuple[int, int], place: tuple[float, float] = (0.5, 0.5), flip: bool = False
) -> Geometry:
    """Return the largest part of an image of ``source`` (h, w) with the shape of ``size`` (H, W).

    place: where it lies in the room that is left, (vertical, horizontal) in [0,1]; the middle by default.
    """
    height, width = source
    scale = max(size[0] / height, size[1] / width)  # the image covers the size
    tall, wide = min(1.0, size[0] / (scale * height)), min(1.0, size[1] / (scale * width))
    top, left = place[0] * (1 - tall), place[1] * (1 - wide)
    return Geometry(left, top, min(1.0, left + wide), min(1.0, top + tall), flip, size)


def sample_geometry(
    source: tuple[int, int], size: tuple[int, int], rng: np.random.Generator, center_crop: bool, random_flip: bool
) -> Geometry:
    """Sample the geometry of one visit."""
    vertical, horizontal, mirrored = rng.random(3)  # always three, so that one option does not change another's result
    place = (0.5, 0.5) if center_crop else (float(vertical), float(horizontal))
    return geometry(source, size, place, random_flip and bool(mirrored < 0.5))


def _means(values: np.ndarray, start: float, stop: float, parts: int) -> np.ndarray:
    """Take means over ``parts`` equal parts of the rows of ``values`` (n,m) from ``start`` to ``stop``, shares of n."""
    length = len(values)
    sums = np.concatenate([np.zeros((1, values.shape[1])), np.cumsum(values, axis=0, dtype=np.float64)])  # (n+1,m)
    edges = np.linspace(start * length, stop * length, parts + 1)
    whole = np.minimum(edges.astype(int), length - 1)
    at_edges = sums[whole] + (edges - whole)[:, None] * values[whole]  # the integral up to each edge
    return np.diff(at_edges, axis=0) * parts / (length * (stop - start))


def same_shape(one: tuple[int, int], other: tuple[int, int]) -> bool:
    """Tell whether two (h, w) differ by a scale only, up to the rounding of the smaller one to whole pixels."""
    (h, w), (tall, wide) = sorted((one, other), key=lambda s: s[0] * s[1])
    scale = (tall * wide / (h * w)) ** 0.5
    return abs(tall / scale - h) <= 1 and abs(wide / scale - w) <= 1


def to_array(image: Image.Image) -> np.ndarray:
    """Return the values of an image (H,W,C): uint8, or float32 for the mode F."""
    array = np.asarray(image)
    return array[..., None] if array.ndim == 2 else array
