"""Sizes of aspect-ratio buckets: a list as users write it, or an automatic one. Loads nothing heavy, as settings do."""

from __future__ import annotations

import math

from localctl.sizes import near_side, typed_size

Size = tuple[int, int]  # (height, width) in pixels
AUTO = "auto"
# (width, height); as diffusers.training_utils.generate_aspect_ratio_buckets
_RATIOS = ((1, 1), (4, 5), (5, 4), (2, 3), (3, 2), (3, 4), (4, 3), (9, 16), (16, 9), (1, 2), (2, 1))
_SMALLER = (1, 0.75, 0.5)  # sides of the automatic buckets, relative to the largest
_MOST_STEP = 64  # pixels between the sides of automatic buckets


def parse_buckets(text: str) -> tuple[Size, ...]:
    """Parse "HEIGHT,WIDTH;HEIGHT,WIDTH;...", as diffusers' scripts write it, without repetitions. ValueError for
    anything else."""
    found: dict[Size, None] = {}
    for pair in filter(None, (part.strip() for part in text.split(";"))):
        sides = [side.strip() for side in pair.split(",")]
        if len(sides) != 2 or not all(side.isascii() and side.isdecimal() for side in sides):
            hint = ""
            if (size := typed_size(pair)) is not None:
                hint = f" (for {pair}, write {size[0]},{size[1]})"
            raise ValueError(f"{pair!r} is not a bucket HEIGHT,WIDTH{hint}")
        found[int(sides[0]), int(sides[1])] = None
    if not found:
        raise ValueError("it names no bucket")
    return tuple(found)


def automatic_buckets(size: Size) -> tuple[Size, ...]:
    """Return buckets of about the area of ``size`` with aspect ratios from 1:2 to 2:1, and smaller ones of 3/4 and 1/2
    of the side for smaller images."""
    side = math.sqrt(size[0] * size[1])
    step = min(_MOST_STEP, max(8, int(side / 8) // 8 * 8))
    found: dict[Size, None] = {}
    for scale in _SMALLER:
        for across, down in _RATIOS:
            ratio = math.sqrt(across / down)
            found[near_side(scale * side / ratio, step), near_side(scale * side * ratio, step)] = None
    return tuple(found)
