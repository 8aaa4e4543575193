"""Colour maps: an image with one colour per region, as other pages save them, to regions of the canvas."""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image

from localctl.color_maps import main_colors, nearest_color
from localctl.images import load_image
from localctl.masks import mask_to_pil
from localctl.sizes import near_side
from localctl.studio.canvas import data_url
from localctl.studio.limits import MAX_REGIONS, MAX_SIDE, MIN_SIDE

_LEAST_SHARE = 0.01  # of the image; smaller colours are smooth edges or compression noise
_MAP_SIDE = 512  # pixels at which the colours are looked for


def regions_by_color(content: bytes) -> tuple[tuple[int, int], list[dict[str, Any]]]:
    """Return the size (height, width) of an image file, as the canvas takes it, and a region without a phrase for each
    of its colours, the largest first; white and black are the ground.

    ValueError for a file that is not an image, or one without a colour of its own.
    """
    image = load_image(content, "The colour map")
    height, width = (int(np.clip(near_side(side), MIN_SIDE, MAX_SIDE)) for side in (image.height, image.width))
    if max(image.size) > _MAP_SIDE:
        image.thumbnail((_MAP_SIDE, _MAP_SIDE), resample=Image.Resampling.NEAREST)  # no new colours
    array = np.asarray(image, dtype=np.float32)
    colors = main_colors(array, MAX_REGIONS + 2)
    shares = [float(mask.mean()) for mask in nearest_color(array, colors)]
    colors = [color for color, share in zip(colors, shares, strict=True) if share >= _LEAST_SHARE]
    masks = nearest_color(array, colors)  # anew, so that noise goes to the regions beside it
    found = [mask for color, mask in zip(colors, masks, strict=True) if not _is_ground(color)][:MAX_REGIONS]
    if not found:
        raise ValueError("The colour map has no colour besides black and white; colour each region of it.")
    return (height, width), [{"phrase": "", "mask": data_url(mask_to_pil(mask))} for mask in found]


def _is_ground(color: tuple[int, int, int]) -> bool:
    """Return whether a colour is white or black, up to compression noise."""
    return min(color) > 235 or max(color) < 20
