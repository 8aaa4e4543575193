"""Aspect-ratio buckets: the sizes to which the images of a dataset are brought, and which image goes to which size.

An image goes to the size at which most of it is seen at the highest resolution: the one with the largest product of the
share of the image that its crop keeps and the square root of the area. Sizes that would enlarge the image by more than
a factor are left out.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from localctl.data.bucket_sizes import Size

_SLACK = 1e-6  # of a factor, against rounding


def assign(images: np.ndarray, sizes: Sequence[Size], most_upscaling: float) -> np.ndarray:
    """Return the bucket of each image, (n,) int16; -1 if all buckets would enlarge it by more than ``most_upscaling``.

    images: (n,2) heights and widths. An image of unknown size, 0, gets the bucket that most images get, or the first.
    """
    best = np.full(len(images), -1, np.int16)
    score = np.zeros(len(images))
    height, width = np.maximum(images, 1).T.astype(np.float64)
    for number, (tall, wide) in enumerate(sizes):
        scale = np.maximum(tall / height, wide / width)  # the image covers the bucket
        kept = tall * wide / (scale * scale * height * width)
        own = np.where(scale <= most_upscaling * (1 + _SLACK), kept * math.sqrt(tall * wide), 0.0)
        better = own > score
        best[better], score[better] = number, own[better]
    unknown = (images <= 0).any(axis=1)
    counts = np.bincount(best[~unknown & (best >= 0)], minlength=len(sizes))
    best[unknown] = counts.argmax()
    return best


@dataclass(frozen=True, eq=False)
class Buckets:
    """The buckets of a dataset. sizes: (height, width) of each. of: the number of each example's bucket, (n,)."""

    sizes: tuple[Size, ...]
    of: np.ndarray

    def members(self, bucket: int) -> np.ndarray:
        """Return the examples in ``bucket``, ascending."""
        return np.flatnonzero(self.of == bucket)

    def size(self, index: int) -> Size:
        """Return the size of example ``index``."""
        return self.sizes[self.of[index]]

    def used(self) -> list[tuple[Size, int]]:
        """Return the buckets that have examples, and their number of examples, the most frequent first."""
        counts = np.bincount(self.of, minlength=len(self.sizes)).tolist()
        pairs = [(size, count) for size, count in zip(self.sizes, counts, strict=True) if count]
        return sorted(pairs, key=lambda pair: -pair[1])

    def digest(self) -> str:
        """Return the sha256 of sizes and assignment."""
        return hashlib.sha256(repr(self.sizes).encode() + self.of.astype("<i2").tobytes()).hexdigest()

    def remarks(self, batch_size: int) -> list[str]:
        """Return clauses on the buckets: their counts, and those with fewer examples than a global batch."""
        few = [pair for pair in self.used() if pair[1] < batch_size]
        lines = [f"buckets (width x height): {_words(self.used())}"]
        if few:
            lines.append(
                f"{len(few)} buckets have fewer examples than the {batch_size} of a batch, which repeats them: "
                f"{_words(few)}; leave these sizes out of data.aspect_ratio_buckets, or lower train_batch_size"
            )
        return lines


def _words(used: Sequence[tuple[Size, int]]) -> str:
    """Format buckets and counts: ``512x640: 120, 640x512: 80``."""
    return ", ".join(f"{width}x{height}: {count}" for (height, width), count in used)
