"""Joint geometry: an image, its condition and its mask are scaled, cropped and mirrored in the same way.

The crop is stored as fractions of the image's sides, so that it applies to a condition or mask of another size, too.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image

IMAGE, SMOOTH, NEAREST = Image.Resampling.LANCZOS, Image.Resampling.BILINEAR, Image.Resampling.NEAREST


@dataclass(frozen=True)
class Geometry:
    """A crop in fractions of the image's sides, whether it is mirrored, and the output size (height, width)."""

    left: float
    top: float
    right: float
    bottom: float
    flip: bool
    size: tuple[int, int]

    @property
    def view(self) -> str:
        """A name of this geometry; different geometries have different names."""
        return f"{self.left!r} {self.top!r} {self.right!r} {self.bottom!r} {self.flip:d} {self.size[0]}x{self.size[1]}"

    def origin(self, source: tuple[int, int]) -> tuple[int, int]:
        """Return SDXL's crop coordinates (top, left): in pixels of an image of ``source`` (h, w) that was scaled to
        cover ``size`` and, with ``flip``, mirrored."""
        scale = max(self.size[0] / source[0], self.size[1] / source[1])
        left = 1 - self.right if self.flip else self.left
        return round(self.top * scale * source[0]), round(left * scale * source[1])

    def apply(self, image: Image.Image, resample: Image.Resampling) -> Image.Image:
        """Crop, scale and mirror ``image`` of any size, in Pillow's mode L, RGB or F."""
        width, height = image.size
        box = (self.left * width, self.top * height, self.right * width, self.bottom * height)
        cropped = image.resize((self.size[1], self.size[0]), resample, box)
        return cropped.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if self.flip else cropped

    def apply_to_mask(self, mask: np.ndarray) -> np.ndarray:
        """Crop, scale and mirror ``mask`` (h,w) float of any size; return (H,W) float32.

        Each pixel of the result is the exact mean over the area it covers. Pillow's box filter takes or leaves whole
        pixels, which moves edges by up to half a pixel.
        """
        rows = _means(mask, self.top, self.bottom, self.size[0])
        means = _means(rows.T, self.left, self.right, self.size[1]).T
        return np.ascontiguousarray(means[:, ::-1] if self.flip else means, dtype=np.float32)


def geometry(
    source: tuple[int, int], size: tuple[int, int], place: tuple[float, float] = (0.5, 0.5), flip: bool = False
) -> Geometry:
    """Return the largest crop of an image of ``source`` (h, w) with the aspect ratio of ``size`` (H, W).

    place: position of the crop, (vertical, horizontal) in [0,1]: 0 = top or left, 1 = bottom or right.
    """
    height, width = source
    scale = max(size[0] / height, size[1] / width)  # the image covers the size
    tall, wide = min(1.0, size[0] / (scale * height)), min(1.0, size[1] / (scale * width))
    top, left = place[0] * (1 - tall), place[1] * (1 - wide)
    return Geometry(left, top, min(1.0, left + wide), min(1.0, top + tall), flip, size)


def sample_geometry(
    source: tuple[int, int], size: tuple[int, int], rng: np.random.Generator, center_crop: bool, random_flip: bool
) -> Geometry:
    """Sample the geometry of one example in one epoch; see ``DataConfig.center_crop`` and ``random_flip``."""
    vertical, horizontal, mirrored = rng.random(3)  # always all three, so that the options are independent
    place = (0.5, 0.5) if center_crop else (float(vertical), float(horizontal))
    return geometry(source, size, place, random_flip and bool(mirrored < 0.5))


def _means(values: np.ndarray, start: float, stop: float, parts: int) -> np.ndarray:
    """Average the rows of ``values`` (n,m) over ``parts`` equal intervals from ``start`` to ``stop``, shares of n."""
    length = len(values)
    sums = np.concatenate([np.zeros((1, values.shape[1])), np.cumsum(values, axis=0, dtype=np.float64)])  # (n+1,m)
    edges = np.linspace(start * length, stop * length, parts + 1)
    whole = np.minimum(edges.astype(int), length - 1)
    at_edges = sums[whole] + (edges - whole)[:, None] * values[whole]  # the integral up to each edge
    return np.diff(at_edges, axis=0) * parts / (length * (stop - start))


def same_shape(one: tuple[int, int], other: tuple[int, int]) -> bool:
    """Return whether two (h, w) differ by a scale only, up to the rounding of the smaller one to whole pixels."""
    (h, w), (tall, wide) = sorted((one, other), key=lambda s: s[0] * s[1])
    scale = (tall * wide / (h * w)) ** 0.5
    return abs(tall / scale - h) <= 1 and abs(wide / scale - w) <= 1


def to_array(image: Image.Image) -> np.ndarray:
    """Return the pixels of an image (H,W,C): uint8, or float32 for mode F."""
    array = np.asarray(image)
    return array[..., None] if array.ndim == 2 else array
