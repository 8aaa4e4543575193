"""Masks: float (B,1,H,W) or (1,H,W) in [0,1], 1 = controlled. Random shapes, files, and resizing to any grid.

Random shapes are level sets of a distance field (distance to the shape's centre or line, over its radius): the area is
set by where the field is cut, so a wanted area is met by construction. No sampler here tries and rejects.
"""

import math
import warnings
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from localctl.images import open_gray
from localctl.settings import MASK_KINDS as MASK_KINDS
from localctl.settings import MASK_RESIZE, MaskConfig

# What may stand for white in a mask of two values, as a share of its file's range.
_ONES = {1 / 255: "0 and 1 of 255", 255 / 65535: "0 and 255 of 65535", 1 / 65535: "0 and 1 of 65535"}
_DIM, _WHITE, _NOISE = 0.5, 0.98, 0.05  # a mask in doubt has nothing brighter; what counts as white, and as noise
_FEW, _LABELS = 0.005, 32  # share of pixels that may be flat by chance; more values than that are no labels


def resize_mask(mask: Tensor, size: tuple[int, int], mode: str = "area") -> Tensor:
    """Bring ``mask`` (B,1,H,W) to (B,1,h,w) with ``size`` = (h, w); any sizes, smaller or larger.

    ``area``: the covered share of each cell (leaks over the border on coarse grids). ``nearest``: one pixel per cell
    (as published; misses thin masks). ``inside``: the minimum over each cell, 1 only where the cell lies wholly inside.
    ``cover``: the maximum, so that nothing of the mask is lost. ValueError for an unknown ``mode``.
    """
    if mode not in MASK_RESIZE:
        raise ValueError(f"Unknown mask resize {mode!r}; choose one of {', '.join(MASK_RESIZE)}.")
    assert mask.ndim == 4 and mask.shape[1] == 1
    if tuple(mask.shape[-2:]) == tuple(size):
        return mask
    if mode == "inside":  # (B,1,h,w); adaptive windows contain every pixel that touches the cell
        return -F.adaptive_max_pool2d(-mask, size)
    if mode == "cover":
        return F.adaptive_max_pool2d(mask, size)
    return F.interpolate(mask, size=size, mode=mode)


def mask_feature(feature: Tensor, mask: Tensor, mode: str = "area") -> Tensor:
    """``feature`` (B,c,h,w) times ``mask`` (B,1,H,W), brought to its grid as for :func:`resize_mask`.

    where, not only a product: 0 * inf is NaN, and half precision overflows outside the mask must stay outside.
    """
    cells = resize_mask(mask.float(), (feature.shape[-2], feature.shape[-1]), mode).to(feature.dtype)  # (B,1,h,w)
    return torch.where(cells > 0, feature * cells, torch.zeros_like(feature))


def sample_mask(
    config: MaskConfig, size: tuple[int, int], rng: np.random.Generator, object_masks: Tensor | None = None
) -> Tensor:
    """Sample one mask (1,H,W) float32 in [0,1], determined by ``config``, ``size`` = (H, W), ``rng`` and the objects.

    ``object_masks`` (n,H,W) in [0,1] are needed by the kind ``objects``. No sample is rejected: it always ends.

    Raises:
        ValueError: no mask of this kind and size has an area in [min_area, max_area]; ``objects`` without objects of
            this size; a ``fixed`` box that holds no pixel of this size.
    """
    kind: str = config.kind
    if kind == "mixture":
        assert config.mixture is not None
        kinds = sorted(config.mixture)  # the order in a file must not matter
        weights = np.array([config.mixture[name] for name in kinds], dtype=np.float64)
        kind = str(rng.choice(kinds, p=weights / weights.sum()))
    if kind == "full":
        mask = np.ones(size, np.float32)
    elif kind == "fixed":
        mask = _fixed(config, size)
    elif kind == "objects":
        mask = _objects(config, size, rng, object_masks)
    elif kind == "box":
        sample_box = _box if config.box_law == "sides" else _corners
        mask = sample_box(size, *_area_bounds(config, size), rng)
    else:
        field = _stroke_field(config, size, rng) if kind == "strokes" else _disc_field(kind, config, size, rng)
        mask = _cut(field, *_area_bounds(config, size))
    return torch.from_numpy(_soften(mask, config.soft_edge))[None]  # (1,H,W)


def disc_mask(centre: tuple[float, float], radius: float, size: int = 512) -> Tensor:
    """(1, size, size) float32: 1 where a pixel's first corner is nearer to ``centre`` (x, y) than ``radius``, else 0.

    All in fractions of the sides, so that a disc stretched over an image that is not square is an ellipse. ValueError
    for a centre outside [0, 1] or a radius that is not positive.
    """
    if len(centre) != 2 or not all(0 <= value <= 1 for value in centre):
        raise ValueError(f"The centre of a disc is (x, y) in [0, 1], not {centre}; divide pixels by width and height.")
    if not 0 < radius < math.inf:
        raise ValueError(f"The radius of a disc is a positive fraction of the sides, not {radius}.")
    axis = torch.arange(size, dtype=torch.float64) / size
    distance = (axis[:, None] - centre[1]) ** 2 + (axis[None] - centre[0]) ** 2
    return (distance < radius**2).float()[None]


def load_mask(path: str | Path, size: tuple[int, int] | None = None) -> Tensor:
    """Read a mask file as (1,H,W) float32 in [0,1]; white = controlled, transparent = not.

    A mask that holds 0 and 1 in place of black and white is stretched, as :func:`stretch_mask`; this, and what looks
    like labels, is warned of. ValueError when the file is no readable image, its (H, W) is not ``size``, or nothing in
    it is white.
    """
    mask, how = stretch_mask(open_gray(path))
    if size is not None and mask.shape != tuple(size):
        raise ValueError(
            f"The mask {path} is {mask.shape[1]}x{mask.shape[0]} pixels but the image is {size[1]}x{size[0]}; "
            "save the mask at the image's size."
        )
    if not mask.any():
        raise ValueError(f"The mask {path} is black everywhere; paint what shall be controlled in white.")
    if said := how or mask_doubt(mask):
        warnings.warn(f"The mask {path} {said}.", stacklevel=2)
    return torch.from_numpy(mask)[None]


def stretch_mask(gray: np.ndarray) -> tuple[np.ndarray, str]:
    """Return a mask as read from a file, (H,W) float32 in [0,1], with 0 and 1 put for black and white where that is
    certain: nothing is in it but 0 and 1 of 8 or 16 bits, or 0 and 255 of 16 bits.

    Returns:
        The mask and, if it was stretched, what was done as a clause ("holds only ..."); else the mask itself and "".
    """
    peak = float(gray.max(initial=0))
    for one, words in _ONES.items():
        if abs(peak - one) < 1e-7 and bool(((gray == 0) | (gray == gray.max())).all()):
            return (gray > 0).astype(np.float32), f"holds only {words}; it is read as black and white"
    return gray, ""


def mask_doubt(mask: np.ndarray) -> str:
    """Why ``mask`` (H,W) in [0,1], not all black, may be no mask but a map of labels, as a clause; "" for nothing.

    That is a dim one, or one of flat patches of gray. Feathered and antialiased edges and the noise of a codec are not
    flat: their neighbours differ.
    """
    way_out = "are these labels? Controlled is what is white; save 0 and 255, or leave it if this is meant"
    peak = float(mask.max(initial=0))
    if 0 < peak < _DIM:
        return f"is dim, its brightest value is {peak:.2g} of 1; {way_out}"
    # The noise of a codec shows near white, too, and may be flat near black.
    black = _NOISE if bool(((mask > 0.9) & (mask < 1)).any()) else 0.0
    here, below, right = mask[:-1, :-1], mask[1:, :-1], mask[:-1, 1:]
    gray = here[(here == below) & (here == right) & (here > black) & (here < _WHITE)]
    if gray.size > max(np.count_nonzero(mask >= _WHITE), _FEW * mask.size):
        values = np.unique(gray)
        if values.size <= _LABELS:  # a wide gradient has many
            return f"is mostly flat gray ({', '.join(f'{value:.2g}' for value in values[:3])} of 1); {way_out}"
    return ""


def _area_bounds(config: MaskConfig, size: tuple[int, int]) -> tuple[int, int]:
    """Fewest and most pixels of a mask of this size; at least one pixel."""
    pixels = size[0] * size[1]
    slack = 1e-9 * pixels  # 0.25 * 64 must be 16, whatever the rounding
    fewest, most = max(1, math.ceil(config.min_area * pixels - slack)), math.floor(config.max_area * pixels + slack)
    if fewest > most:
        raise ValueError(
            f"No mask of {size[1]}x{size[0]} pixels has an area between {config.min_area} and {config.max_area} of the "
            "image; widen min_area and max_area."
        )
    return fewest, most


def _fixed(config: MaskConfig, size: tuple[int, int]) -> np.ndarray:
    assert config.box is not None
    height, width = size
    x0, y0, x1, y1 = config.box
    mask = np.zeros(size, np.float32)
    mask[round(y0 * height) : round(y1 * height), round(x0 * width) : round(x1 * width)] = 1
    if not mask.any():
        raise ValueError(f"The fixed mask box {config.box} holds no pixel of a {width}x{height} image; enlarge it.")
    return mask


def _box(size: tuple[int, int], fewest: int, most: int, rng: np.random.Generator) -> np.ndarray:
    """Return a rectangle: its height uniform over all that allow the area, its width uniform over what is left."""
    height, width = size
    narrowest, widest = _widths(size, fewest, most, (height, width))
    h = 1 + int(rng.choice(np.flatnonzero(narrowest <= widest)))
    w = int(rng.integers(narrowest[h - 1], widest[h - 1] + 1))
    top, left = int(rng.integers(0, height - h + 1)), int(rng.integers(0, width - w + 1))
    mask = np.zeros(size, np.float32)
    mask[top : top + h, left : left + w] = 1
    return mask


def _widths(size: tuple[int, int], fewest: int, most: int, largest: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Return the least and the greatest width of a box of ``fewest`` to ``most`` pixels for each height 1, 2, ... up to
    ``largest`` (height, width); where the least is greater there is none. ValueError when there is none at all."""
    heights = np.arange(1, largest[0] + 1)
    narrowest, widest = -(-fewest // heights), np.minimum(largest[1], most // heights)
    if not (narrowest <= widest).any():
        raise ValueError(
            f"No box in {size[1]}x{size[0]} pixels has an area of {fewest} to {most} pixels; widen min_area and "
            "max_area."
        )
    return narrowest, widest


def _corners(size: tuple[int, int], fewest: int, most: int, rng: np.random.Generator) -> np.ndarray:
    """Return a rectangle by the published law: on each axis its first pixel uniform over all but the last, its end
    uniform over the pixels behind the first; of these rectangles, one that has the area.

    Of n + 1 pixels, a side that starts at i has the law 1 / n / (n - i) whatever its length, so one of k pixels has
    (1/k + ... + 1/n) / n. Height, width and place come one after the other, by their shares of the boxes that have the
    area: nothing is sampled and rejected.
    """
    height, width = size
    largest = (height - 1, width - 1)  # the end is a pixel, too: the last row and column stay outside
    narrowest, widest = _widths(size, fewest, most, largest)
    of_height, of_width = (np.cumsum(1 / np.arange(n, 0, -1))[::-1] for n in largest)  # of side 1, 2, ..., times n
    up_to = np.concatenate([[0.0], np.cumsum(of_width)])
    share = of_height * np.where(narrowest <= widest, up_to[widest] - up_to[np.minimum(narrowest - 1, widest)], 0.0)
    h = 1 + int(rng.choice(largest[0], p=share / share.sum()))
    shares = of_width[narrowest[h - 1] - 1 : widest[h - 1]]
    w = int(narrowest[h - 1]) + int(rng.choice(len(shares), p=shares / shares.sum()))
    starts = [1 / np.arange(n, side - 1, -1) for n, side in zip(largest, (h, w), strict=True)]
    top, left = (int(rng.choice(len(start), p=start / start.sum())) for start in starts)
    mask = np.zeros(size, np.float32)
    mask[top : top + h, left : left + w] = 1
    return mask


def _disc_field(kind: str, config: MaskConfig, size: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """Distance of each pixel to the nearest centre, over that one's radius: <= 1 inside the circles or squares."""
    height, width = size
    rows, columns = np.arange(height)[:, None] + 0.5, np.arange(width)[None] + 0.5  # pixel centres
    field = np.full(size, np.inf)
    for _ in range(_draw_count(config, rng)):
        y, x = rng.uniform(0, height), rng.uniform(0, width)
        radius = rng.uniform(0.10, 0.25) * min(size)
        dy, dx = np.abs(rows - y), np.abs(columns - x)
        distance = np.hypot(dy, dx) if kind == "circle" else np.maximum(dy, dx)
        field = np.minimum(field, distance / radius)
    return field


def _stroke_field(config: MaskConfig, size: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """Distance of each pixel to the nearest polyline, over that one's half width."""
    height, width = size
    field = np.full(size, np.inf)
    for _ in range(_draw_count(config, rng)):
        corners = int(rng.integers(2, 6))
        points = np.empty((corners, 2))
        points[0] = rng.uniform(0, width), rng.uniform(0, height)
        for i in range(1, corners):  # a walk with long steps; the border bends it back
            angle, step = rng.uniform(0, 2 * math.pi), rng.uniform(0.15, 0.5) * max(size)
            points[i] = points[i - 1] + step * np.array([math.cos(angle), math.sin(angle)])
            points[i] = np.clip(points[i], 0, (width - 1, height - 1))
        points = np.clip(points, 0, (width - 1, height - 1)).round().astype(np.int32)
        line = np.zeros(size, np.uint8)
        cv2.polylines(line, [points.reshape(-1, 1, 2)], isClosed=False, color=1, thickness=1)
        half_width = max(0.5, rng.uniform(0.02, 0.08) * min(size))
        field = np.minimum(field, _distance_to(line > 0) / half_width)
    return field


def _objects(
    config: MaskConfig, size: tuple[int, int], rng: np.random.Generator, object_masks: Tensor | None
) -> np.ndarray:
    if object_masks is None or object_masks.shape[0] == 0:
        raise ValueError("The mask kind 'objects' needs object masks, which this data has not; choose another kind.")
    if tuple(object_masks.shape[1:]) != tuple(size):
        raise ValueError(f"The object masks must be (n, {size[0]}, {size[1]}), not {tuple(object_masks.shape)}.")
    number = min(_draw_count(config, rng), object_masks.shape[0])
    chosen = rng.choice(object_masks.shape[0], size=number, replace=False)
    mask = object_masks.detach().cpu().float().numpy()[chosen].max(axis=0).clip(0, 1)  # (H,W), anti-aliased
    core = mask >= 0.5
    if not core.any():
        raise ValueError("The chosen object masks are empty; leave objects without a visible pixel out of the data.")
    fewest = max(1, math.ceil(config.min_area * mask.size - 1e-9 * mask.size))
    if core.sum() >= fewest:
        return mask
    return np.maximum(mask, _cut(_distance_to(core), fewest, mask.size, level=0.0))


def _draw_count(config: MaskConfig, rng: np.random.Generator) -> int:
    fewest, most = config.counts
    return int(rng.integers(fewest, most + 1))


def _distance_to(shape: np.ndarray) -> np.ndarray:
    """Euclidean distance in pixels of every pixel to ``shape`` (bool, not empty)."""
    assert shape.any()
    return cv2.distanceTransform((~shape).astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)


def _cut(field: np.ndarray, fewest: int, most: int, level: float = 1.0) -> np.ndarray:
    """Return the pixels where ``field`` <= ``level``, with the level moved so that they number ``fewest`` to
    ``most``."""
    within = int(np.count_nonzero(field <= level))
    number = min(max(within, fewest), most)
    edge = level if number == within else np.partition(field, number - 1, axis=None)[number - 1]
    if np.count_nonzero(field <= edge) <= most:
        return (field <= edge).astype(np.float32)
    if np.count_nonzero(field < edge) >= fewest:
        return (field < edge).astype(np.float32)
    # Equal distances straddle both bounds: the area goes before the shape, take as many pixels as fit.
    mask = np.zeros(field.size, np.float32)
    mask[np.argsort(field, axis=None, kind="stable")[:number]] = 1
    return mask.reshape(field.shape)


def _soften(mask: np.ndarray, width: float) -> np.ndarray:
    """Add a linear ramp of ``width`` pixels outside the mask; what was controlled stays fully controlled."""
    core = mask >= 0.5
    if width == 0 or core.all():
        return mask
    ramp = np.clip(1 - _distance_to(core) / (width + 1), 0, 1)  # still positive ``width`` pixels away
    return np.maximum(mask, ramp).astype(np.float32)


def mask_to_pil(mask: Tensor) -> Image.Image:
    """Return a mask (1,H,W) in [0,1] as a grayscale image, white = controlled."""
    return Image.fromarray((mask[0].clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy())
