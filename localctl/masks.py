"""Masks: float (B,1,H,W) or (1,H,W) in [0,1], 1 = controlled. Random shapes, files, and resizing to any grid.

Random shapes are level sets of a distance field (the distance to the shape's centre or line, divided by its radius).
The area follows from the level at which the field is cut, so bounds on the area are met without rejection sampling.
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
from localctl.settings import MASK_RESIZE, MaskConfig

# Values, as shares of the file's range, that are read as white in a mask of two values.
_ONES = {1 / 255: "0 and 1 of 255", 255 / 65535: "0 and 255 of 65535", 1 / 65535: "0 and 1 of 65535"}
# A mask whose maximum is below _DIM is doubtful; _WHITE and above is white, up to _NOISE may be compression noise.
_DIM, _WHITE, _NOISE = 0.5, 0.98, 0.05
_FEW, _LABELS = 0.005, 32  # share of pixels that may be flat by chance; the most values of a map of labels


def resize_mask(mask: Tensor, size: tuple[int, int], mode: str = "area") -> Tensor:
    """Resize ``mask`` (B,1,H,W) to (B,1,h,w) with ``size`` = (h, w), smaller or larger.

    ``area``: the covered share of each cell (leaks over the border on coarse grids). ``nearest``: one pixel per cell
    (as published; misses thin masks). ``inside``: the minimum over each cell, so 1 only in cells completely inside.
    ``cover``: the maximum, so that no part of the mask is lost. ValueError for an unknown ``mode``.
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


def grow_mask(mask: Tensor, margin: int) -> Tensor:
    """Return ``mask`` (B,1,H,W), grown by ``margin`` pixels in rows and columns: the maximum near each pixel."""
    if not margin:
        return mask
    rows, columns = (min(margin, side - 1) for side in mask.shape[-2:])
    return F.max_pool2d(F.max_pool2d(mask, (2 * rows + 1, 1), 1, (rows, 0)), (1, 2 * columns + 1), 1, (0, columns))


def mask_feature(feature: Tensor, mask: Tensor, mode: str = "area") -> Tensor:
    """Multiply ``feature`` (B,c,h,w) by ``mask`` (B,1,H,W), resized to (h, w) as by :func:`resize_mask`."""
    cells = resize_mask(mask.float(), (feature.shape[-2], feature.shape[-1]), mode).to(feature.dtype)  # (B,1,h,w)
    # Not a product alone: outside the mask a feature may overflow half precision, and 0 * inf is NaN.
    return torch.where(cells > 0, feature * cells, torch.zeros_like(feature))


def sample_mask(
    config: MaskConfig, size: tuple[int, int], rng: np.random.Generator, object_masks: Tensor | None = None
) -> Tensor:
    """Sample one mask (1,H,W) float32 in [0,1], determined by ``config``, ``size`` = (H, W), ``rng`` and the objects.

    The kind ``objects`` needs ``object_masks`` (n,H,W) in [0,1]. No sample is rejected, so sampling always ends.

    Raises:
        ValueError: no mask of this kind and size has an area in [min_area, max_area]; the kind ``objects`` without
            object masks of this size; a ``fixed`` box that contains no pixel of an image of this size.
    """
    kind: str = config.kind
    if kind == "mixture":
        assert config.mixture is not None
        kinds = sorted(config.mixture)  # so that the order in a file does not matter
        weights = np.array([config.mixture[name] for name in kinds], dtype=np.float64)
        kind = str(rng.choice(kinds, p=weights / weights.sum()))
    if kind == "full":
        mask = np.ones(size, np.float32)
    elif kind == "fixed":
        mask = _fixed(config, size)
    elif kind == "objects":
        mask = _objects(config, size, rng, object_masks)
    elif kind == "box":
        sample_box = _box if config.box_law == "sides" else _box_by_corners
        mask = sample_box(size, *_area_bounds(config, size), rng)
    else:
        field = _stroke_field(config, size, rng) if kind == "strokes" else _disc_field(kind, config, size, rng)
        mask = _cut(field, *_area_bounds(config, size))
    return torch.from_numpy(_soften(mask, config.soft_edge))[None]  # (1,H,W)


def disc_mask(centre: tuple[float, float], radius: float, size: int = 512) -> Tensor:
    """Return a disc (1, size, size) float32: 1 where a pixel's first corner is nearer to ``centre`` than ``radius``.

    ``centre`` (x, y) and ``radius`` are fractions of the sides, so that stretched over an image that is not square the
    disc becomes an ellipse. ValueError for a centre outside [0, 1] or a radius that is not positive.
    """
    if len(centre) != 2 or not all(0 <= value <= 1 for value in centre):
        raise ValueError(
            f"The centre of a disc must be (x, y) in [0, 1], not {centre}; divide pixels by width and height."
        )
    if not 0 < radius < math.inf:
        raise ValueError(f"The radius of a disc must be a positive fraction of the sides, not {radius}.")
    axis = torch.arange(size, dtype=torch.float64) / size
    distance = (axis[:, None] - centre[1]) ** 2 + (axis[None] - centre[0]) ** 2
    return (distance < radius**2).float()[None]


def load_mask(path: str | Path, size: tuple[int, int] | None = None) -> Tensor:
    """Read a mask file as (1,H,W) float32 in [0,1]; white = controlled, transparent = not.

    A mask that holds 0 and 1 in place of black and white is stretched by :func:`stretch_mask`. That, and a mask that
    looks like a map of labels, causes a warning. ValueError when the file is not a readable image, its (H, W) is not
    ``size``, or the mask is black everywhere.
    """
    mask, stretched = stretch_mask(open_gray(path))
    if size is not None and mask.shape != tuple(size):
        raise ValueError(
            f"The mask {path} is {mask.shape[1]}x{mask.shape[0]} pixels but the image is {size[1]}x{size[0]}; "
            "save the mask at the image's size."
        )
    if not mask.any():
        raise ValueError(f"The mask {path} is black everywhere; paint the part to control white.")
    if problem := stretched or mask_doubt(mask):
        warnings.warn(f"The mask {path} {problem}.", stacklevel=2)
    return torch.from_numpy(mask)[None]


def stretch_mask(gray: np.ndarray) -> tuple[np.ndarray, str]:
    """Stretch a mask (H,W) in [0,1], as read from a file, to black and white where its values are certain to mean that.

    That is a mask which holds only 0 and 1 of 8 or 16 bits, or only 0 and 255 of 16 bits.

    Returns:
        The stretched mask, float32, and a clause that describes the change ("holds only ..."); or the same mask and "".
    """
    peak = float(gray.max(initial=0))
    for one, words in _ONES.items():
        if abs(peak - one) < 1e-7 and bool(((gray == 0) | (gray == gray.max())).all()):
            return (gray > 0).astype(np.float32), f"holds only {words}; it is read as black and white"
    return gray, ""


def mask_doubt(mask: np.ndarray) -> str:
    """Return a clause on why ``mask`` (H,W) in [0,1], not all black, may be a map of labels; "" if nothing suggests it.

    Suspicious is a dim mask, or one with flat patches of gray. Feathered and antialiased edges and compression noise
    are not flat: neighbouring pixels differ.
    """
    way_out = "are these labels? White is controlled; save 0 and 255, or ignore this if the gray values are intended"
    peak = float(mask.max(initial=0))
    if 0 < peak < _DIM:
        return f"is dim, its brightest value is {peak:.2g} of 1; {way_out}"
    # Compression noise appears near white, too, and may be flat near black.
    black = _NOISE if bool(((mask > 0.9) & (mask < 1)).any()) else 0.0
    here, below, right = mask[:-1, :-1], mask[1:, :-1], mask[:-1, 1:]
    gray = here[(here == below) & (here == right) & (here > black) & (here < _WHITE)]
    if gray.size > max(np.count_nonzero(mask >= _WHITE), _FEW * mask.size):
        values = np.unique(gray)
        if values.size <= _LABELS:  # a wide gradient has more
            return f"is mostly flat gray ({', '.join(f'{value:.2g}' for value in values[:3])} of 1); {way_out}"
    return ""


def _area_bounds(config: MaskConfig, size: tuple[int, int]) -> tuple[int, int]:
    """Return the fewest and the most pixels of a mask in an image of this size; at least one pixel."""
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
        raise ValueError(f"The fixed mask box {config.box} contains no pixel of a {width}x{height} image; enlarge it.")
    return mask


def _box(size: tuple[int, int], fewest: int, most: int, rng: np.random.Generator) -> np.ndarray:
    """Sample a rectangle: its height uniform over all that allow the area, then its width over all that allow it."""
    height, width = size
    narrowest, widest = _width_range(size, fewest, most, (height, width))
    h = 1 + int(rng.choice(np.flatnonzero(narrowest <= widest)))
    w = int(rng.integers(narrowest[h - 1], widest[h - 1] + 1))
    top, left = int(rng.integers(0, height - h + 1)), int(rng.integers(0, width - w + 1))
    mask = np.zeros(size, np.float32)
    mask[top : top + h, left : left + w] = 1
    return mask


def _width_range(
    size: tuple[int, int], fewest: int, most: int, largest: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """Return the least and the greatest width of a box of ``fewest`` to ``most`` pixels, for each height 1, 2, ...

    Heights and widths go up to ``largest`` (height, width). Where the least width exceeds the greatest, no width fits;
    ValueError when that is so for all heights.
    """
    heights = np.arange(1, largest[0] + 1)
    narrowest, widest = -(-fewest // heights), np.minimum(largest[1], most // heights)
    if not (narrowest <= widest).any():
        raise ValueError(
            f"No box in {size[1]}x{size[0]} pixels has an area of {fewest} to {most} pixels; widen min_area and "
            "max_area."
        )
    return narrowest, widest


def _box_by_corners(size: tuple[int, int], fewest: int, most: int, rng: np.random.Generator) -> np.ndarray:
    """Sample a rectangle by the published law, conditioned on its area.

    By that law, on each axis the first pixel is uniform over all but the last, and the end is uniform over the pixels
    after the first. On n + 1 pixels, each side that starts at i has the probability 1 / n / (n - i), so that a length k
    has (1/k + ... + 1/n) / n. Height, width and position are sampled one after another from their distributions given
    the area, without rejection.
    """
    height, width = size
    largest = (height - 1, width - 1)  # the end is a pixel outside the box, so the last row and column stay outside
    narrowest, widest = _width_range(size, fewest, most, largest)
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
    """Return the distance (H,W) of each pixel to a centre over its radius, the least of all; <= 1 inside the shapes."""
    height, width = size
    rows, columns = np.arange(height)[:, None] + 0.5, np.arange(width)[None] + 0.5  # pixel centres
    field = np.full(size, np.inf)
    for _ in range(_sample_count(config, rng)):
        y, x = rng.uniform(0, height), rng.uniform(0, width)
        radius = rng.uniform(0.10, 0.25) * min(size)
        dy, dx = np.abs(rows - y), np.abs(columns - x)
        distance = np.hypot(dy, dx) if kind == "circle" else np.maximum(dy, dx)
        field = np.minimum(field, distance / radius)
    return field


def _stroke_field(config: MaskConfig, size: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """Return the distance (H,W) of each pixel to a polyline over its half width, the least of all; <= 1 inside."""
    height, width = size
    field = np.full(size, np.inf)
    for _ in range(_sample_count(config, rng)):
        corners = int(rng.integers(2, 6))
        points = np.empty((corners, 2))
        points[0] = rng.uniform(0, width), rng.uniform(0, height)
        for i in range(1, corners):  # a random walk with long steps, clipped at the border
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
        raise ValueError("The mask kind 'objects' needs object masks, but this sample has none; choose another kind.")
    if tuple(object_masks.shape[1:]) != tuple(size):
        raise ValueError(f"The object masks must be (n, {size[0]}, {size[1]}), not {tuple(object_masks.shape)}.")
    number = min(_sample_count(config, rng), object_masks.shape[0])
    chosen = rng.choice(object_masks.shape[0], size=number, replace=False)
    mask = object_masks.detach().cpu().float().numpy()[chosen].max(axis=0).clip(0, 1)  # (H,W), anti-aliased
    core = mask >= 0.5
    if not core.any():
        raise ValueError("The chosen object masks are empty; remove objects without a visible pixel from the dataset.")
    fewest = max(1, math.ceil(config.min_area * mask.size - 1e-9 * mask.size))
    if core.sum() >= fewest:
        return mask
    return np.maximum(mask, _cut(_distance_to(core), fewest, mask.size, level=0.0))


def _sample_count(config: MaskConfig, rng: np.random.Generator) -> int:
    fewest, most = config.counts
    return int(rng.integers(fewest, most + 1))


def _distance_to(shape: np.ndarray) -> np.ndarray:
    """Return the Euclidean distance in pixels of every pixel to ``shape`` (bool (H,W), not empty)."""
    assert shape.any()
    return cv2.distanceTransform((~shape).astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)


def _cut(field: np.ndarray, fewest: int, most: int, level: float = 1.0) -> np.ndarray:
    """Return the mask ``field`` <= ``level``, with the level moved so that it has ``fewest`` to ``most`` pixels."""
    within = int(np.count_nonzero(field <= level))
    number = min(max(within, fewest), most)
    edge = level if number == within else np.partition(field, number - 1, axis=None)[number - 1]
    if np.count_nonzero(field <= edge) <= most:
        return (field <= edge).astype(np.float32)
    if np.count_nonzero(field < edge) >= fewest:
        return (field < edge).astype(np.float32)
    # So many distances are equal that neither cut meets the bounds: take only some of these pixels.
    mask = np.zeros(field.size, np.float32)
    mask[np.argsort(field, axis=None, kind="stable")[:number]] = 1
    return mask.reshape(field.shape)


def _soften(mask: np.ndarray, width: float) -> np.ndarray:
    """Add a linear ramp of ``width`` pixels outside the mask; controlled pixels stay as they are."""
    core = mask >= 0.5
    if width == 0 or core.all():
        return mask
    ramp = np.clip(1 - _distance_to(core) / (width + 1), 0, 1)  # still positive ``width`` pixels away
    return np.maximum(mask, ramp).astype(np.float32)


def mask_to_pil(mask: Tensor) -> Image.Image:
    """Convert a mask (1,H,W) in [0,1] to a grayscale image, white = controlled."""
    return Image.fromarray((mask[0].clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy())
