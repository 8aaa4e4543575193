"""A classical reader of micro scenes: colour, shape and box of every object, and the background's name.

No learning: pixels are assigned to the nearest palette colour, connected blobs are matched against rotated templates
of the eight shapes. Thresholds were set on `val` scenes; figures are measured on `test` scenes.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import cv2
import numpy as np

from localctl.micro.scenes import holds
from localctl.micro.shapes import BACKGROUNDS, COLORS, MAX_ANGLE, SHAPES, draw_mask

MIN_AREA = 50  # px; the smallest object (a ring or diamond of radius 13) covers over 200
MIN_MATCH = 0.72  # intersection over union with the best template; below it a blob is no object
_TEMPLATE = 48
_SPREAD = 12.0  # radius of gyration of a template, in template pixels


@dataclass(frozen=True)
class Detection:
    """box: xyxy in pixels; match: intersection over union with the best template, in [0, 1]."""

    shape: str
    color: str
    box: tuple[float, float, float, float]
    match: float

    @property
    def phrase(self) -> str:
        return f"{self.color} {self.shape}"

    @property
    def center(self) -> tuple[float, float]:
        return (self.box[0] + self.box[2]) / 2, (self.box[1] + self.box[3]) / 2


@dataclass(frozen=True)
class Reading:
    background: str
    objects: tuple[Detection, ...]

    def has(self, phrase: str) -> bool:
        return any(o.phrase == phrase for o in self.objects)

    def relation(self, first: str, relation: str, second: str) -> bool:
        """Whether some pair of detected objects with these phrases stands in `relation`."""
        firsts = [o.center for o in self.objects if o.phrase == first]
        seconds = [o.center for o in self.objects if o.phrase == second]
        return any(holds(relation, a, b) for a in firsts for b in seconds)


def _normalised(mask: np.ndarray) -> np.ndarray:
    """A blob moved to the centre and scaled to a fixed radius of gyration: float32 (48, 48)."""
    ys, xs = np.nonzero(mask > 0.5)
    cx, cy = xs.mean(), ys.mean()
    scale = _SPREAD / max(1e-3, float(np.sqrt(((xs - cx) ** 2 + (ys - cy) ** 2).mean())))
    middle = (_TEMPLATE - 1) / 2
    matrix = np.array([[scale, 0, middle - scale * cx], [0, scale, middle - scale * cy]], np.float32)
    return cv2.warpAffine(mask.astype(np.float32), matrix, (_TEMPLATE, _TEMPLATE), flags=cv2.INTER_LINEAR)


@lru_cache(maxsize=1)
def _templates() -> tuple[tuple[str, ...], np.ndarray]:
    names, stack = [], []
    for shape in SHAPES:
        for angle in np.arange(-MAX_ANGLE - 3, MAX_ANGLE + 4, 3.0):
            mask = draw_mask(shape, (64.0, 64.0), 40.0, float(angle), 128)
            names.append(shape)
            stack.append(_normalised(mask).ravel())
    return tuple(names), np.stack(stack)


def classify_shape(mask: np.ndarray) -> tuple[str, float]:
    """Best shape of a blob (h, w) in [0, 1] and its soft intersection over union with that template."""
    blob = _normalised(mask).ravel()
    names, stack = _templates()
    overlap = np.minimum(stack, blob).sum(1) / np.maximum(stack, blob).sum(1)
    best = int(overlap.argmax())
    return names[best], float(overlap[best])


def _background(image: np.ndarray) -> tuple[str, np.ndarray]:
    """Name of the background and its level at every pixel, a plane fitted to the border: float32 (h, w, 3)."""
    h, w = image.shape[:2]
    yy, xx = np.mgrid[0:h, 0:w].astype(np.float32)
    edge = np.zeros((h, w), bool)
    edge[:3], edge[-3:], edge[:, :3], edge[:, -3:] = True, True, True, True
    samples = image[edge]
    middle = np.median(samples, axis=0)
    name = min(BACKGROUNDS, key=lambda n: float(np.abs(middle - np.asarray(BACKGROUNDS[n])).sum()))
    close = np.abs(samples - middle).max(1) < 40  # objects that touch the border stay out of the fit
    basis = np.stack([np.ones_like(xx), xx / w, yy / h], axis=-1)
    weights, *_ = np.linalg.lstsq(basis[edge][close], samples[close], rcond=None)
    return name, basis @ weights


def detect(image: np.ndarray, min_match: float = MIN_MATCH) -> Reading:
    """Read a scene: uint8 (h, w, 3) RGB -> background name and objects, largest first.

    ``min_match``: blobs that match no shape as well as this are left out; 0 keeps every blob, for questions of colour
    and place alone.
    """
    smooth = cv2.medianBlur(image, 3).astype(np.float32)
    background, level = _background(smooth)
    away = np.linalg.norm(smooth - level, axis=-1)  # (h, w)
    palette = np.asarray(list(COLORS.values()), np.float32)
    distance = np.linalg.norm(smooth[..., None, :] - palette, axis=-1)  # (h, w, 8)
    nearest = distance.argmin(-1)
    foreground = away > 45
    objects = []
    for blob in _blobs(foreground, nearest, (distance.min(-1) < 0.9 * away) & foreground):
        shape, match = classify_shape(blob)
        if match < min_match:
            continue
        ys, xs = np.nonzero(blob)
        votes = np.bincount(nearest[cv2.erode(blob, np.ones((3, 3), np.uint8)) > 0], minlength=len(COLORS))
        box = (float(xs.min()), float(ys.min()), float(xs.max() + 1), float(ys.max() + 1))
        objects.append(Detection(shape, list(COLORS)[int(votes.argmax())], box, match))
    objects.sort(key=lambda o: -(o.box[2] - o.box[0]) * (o.box[3] - o.box[1]))
    return Reading(background, tuple(objects))


def _blobs(foreground: np.ndarray, nearest: np.ndarray, certain: np.ndarray) -> list[np.ndarray]:
    """Masks uint8 (h, w): cores of one colour, grown back over the blended rim they own.

    A rim between white and red is pink: cores are opened first, so that a rim never makes an object."""
    cores = np.zeros(foreground.shape, np.int32)
    count = 0
    kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (3, 3))
    for color in range(len(COLORS)):
        layer = cv2.morphologyEx(((nearest == color) & certain).astype(np.uint8), cv2.MORPH_OPEN, kernel)
        number, labels, stats, _ = cv2.connectedComponentsWithStats(layer, connectivity=4)
        for i in range(1, number):
            if stats[i, cv2.CC_STAT_AREA] >= MIN_AREA // 2:
                count += 1
                cores[labels == i] = count
    if not count:
        return []
    reach, owner = cv2.distanceTransformWithLabels(
        (cores == 0).astype(np.uint8), cv2.DIST_L2, 5, labelType=cv2.DIST_LABEL_PIXEL
    )
    table = np.zeros(owner.max() + 1, np.int32)
    table[owner[cores > 0]] = cores[cores > 0]
    grown = np.where(foreground & (reach <= 3), table[owner], 0)
    blobs = [(grown == i).astype(np.uint8) for i in range(1, count + 1)]
    return [b for b in blobs if b.sum() >= MIN_AREA]
