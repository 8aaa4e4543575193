"""Detect colour, shape and box of every object in a micro scene, and its background.

The reader is classical, not learned: each pixel is assigned to the nearest colour of the palette, and connected blobs
are matched with rotated templates of the eight shapes. Thresholds were chosen on `val` scenes and on generated images
that were labelled by hand; accuracy is measured on `test` scenes and on other labelled images (docs/evaluation.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import cv2
import numpy as np

from localctl.boxes import Box, Found, Truth, box_around, holds
from localctl.micro.scenes import Scene
from localctl.micro.shapes import BACKGROUNDS, COLORS, MAX_ANGLE, SHAPES, shape_mask

VERSION = 2  # versions detect different objects in the same image: do not compare their results
MIN_AREA = 50  # pixels; the smallest object (a ring or diamond of radius 13) covers over 200
MIN_MATCH = 0.68  # a blob that matches less is no object
MIN_WHOLE = 0.75  # touching blobs of several colours that match less as a whole are separate objects
_TEMPLATE = 48
_SPREAD = 12.0  # radius of gyration of a template, in template pixels
_ROUNDING = 4.0  # sigma of the blur, in pixels, for a shape of radius 40
_THICK = {"star": 0.6, "ring": 0.4}  # inner radius of a thick variant
_DENTS = 0.4  # weight of a difference in solidity, relative to one in overlap


@dataclass(frozen=True)
class Detection:
    """A detected object. box: xyxy in pixels. match: with the best template, in [0, 1] (:func:`classify_shape`)."""

    shape: str
    color: str
    box: Box
    match: float

    @property
    def phrase(self) -> str:
        """Colour and shape, such as "red circle"."""
        return f"{self.color} {self.shape}"

    @property
    def center(self) -> tuple[float, float]:
        """(x, y) of the box's centre, in pixels."""
        return (self.box[0] + self.box[2]) / 2, (self.box[1] + self.box[3]) / 2


@dataclass(frozen=True)
class Reading:
    """What the reader detects in an image: the name of the background, and objects, largest first."""

    background: str
    objects: tuple[Detection, ...]

    def has(self, phrase: str) -> bool:
        """Tell whether an object with this phrase was detected."""
        return any(o.phrase == phrase for o in self.objects)

    def relation(self, first: str, relation: str, second: str) -> bool:
        """Tell whether some pair of detected objects with these phrases has this relation."""
        firsts = [o.center for o in self.objects if o.phrase == first]
        seconds = [o.center for o in self.objects if o.phrase == second]
        return any(holds(relation, a, b) for a in firsts for b in seconds)


def _normalised(mask: np.ndarray) -> np.ndarray:
    """Centre a blob and scale it to a fixed radius of gyration: float32 (48, 48)."""
    ys, xs = np.nonzero(mask > 0.5)
    cx, cy = xs.mean(), ys.mean()
    scale = _SPREAD / max(1e-3, float(np.sqrt(((xs - cx) ** 2 + (ys - cy) ** 2).mean())))
    middle = (_TEMPLATE - 1) / 2
    matrix = np.array([[scale, 0, middle - scale * cx], [0, scale, middle - scale * cy]], np.float32)
    return cv2.warpAffine(mask.astype(np.float32), matrix, (_TEMPLATE, _TEMPLATE), flags=cv2.INTER_LINEAR)


@dataclass(frozen=True)
class _Templates:
    """The templates of all shapes. names: (n,). masks: float32 (n, 48 * 48). solidities: (n,)."""

    names: tuple[str, ...]
    masks: np.ndarray
    solidities: np.ndarray


@lru_cache(maxsize=1)
def _templates() -> _Templates:
    """Render every shape at every angle, sharp as in a scene and with rounded corners as in generated images; stars
    and rings also in a thick variant."""
    names, stack = [], []
    for shape in SHAPES:
        for angle in np.arange(-MAX_ANGLE - 3, MAX_ANGLE + 4, 3.0):
            for inner in (None, _THICK[shape]) if shape in _THICK else (None,):
                sharp = shape_mask(shape, (64.0, 64.0), 40.0, float(angle), 128, inner)
                rounded = ((cv2.GaussianBlur(sharp, (0, 0), _ROUNDING) - 0.5) * 6 + 0.5).clip(0, 1)
                names += [shape, shape]
                stack += [_normalised(sharp), _normalised(rounded)]
    return _Templates(
        tuple(names), np.stack([mask.ravel() for mask in stack]), np.array([_solidity(mask) for mask in stack])
    )


def _solidity(mask: np.ndarray) -> float:
    """Compute the area of a normalised blob over that of its convex hull: 0.6 for a star, 1 for a circle."""
    fine = cv2.resize(mask, None, fx=4, fy=4, interpolation=cv2.INTER_LINEAR) > 0.5
    outlines, _ = cv2.findContours(fine.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    if not outlines:
        return 0.0
    outline = max(outlines, key=cv2.contourArea)
    return cv2.contourArea(outline) / max(1.0, cv2.contourArea(cv2.convexHull(outline)))


def classify_shape(mask: np.ndarray) -> tuple[str, float]:
    """Classify the shape of a blob, (h, w) in [0, 1], and return the shape and its match in [0, 1].

    The match is the soft intersection over union with the best template, minus a penalty for another solidity: a star
    with unequal arms overlaps a square as well as a star, but is less solid.
    """
    blob = _normalised(mask)
    templates = _templates()
    dents = np.abs(templates.solidities - _solidity(blob))
    flat = blob.ravel()
    overlap = np.minimum(templates.masks, flat).sum(1) / np.maximum(templates.masks, flat).sum(1)
    match = overlap - _DENTS * dents
    best = int(match.argmax())
    return templates.names[best], float(match[best].clip(0, 1))


def _background(image: np.ndarray) -> tuple[str, np.ndarray]:
    """Return the name of the background and its colour, a plane fitted to the border: float32 (h, w, 3)."""
    h, w = image.shape[:2]
    yy, xx = np.mgrid[0:h, 0:w].astype(np.float32)
    edge = np.zeros((h, w), bool)
    edge[:3], edge[-3:], edge[:, :3], edge[:, -3:] = True, True, True, True
    samples = image[edge]
    middle = np.median(samples, axis=0)
    name = min(BACKGROUNDS, key=lambda n: float(np.abs(middle - np.asarray(BACKGROUNDS[n])).sum()))
    close = np.abs(samples - middle).max(1) < 40  # leave objects that touch the border out of the fit
    basis = np.stack([np.ones_like(xx), xx / w, yy / h], axis=-1)
    weights, *_ = np.linalg.lstsq(basis[edge][close], samples[close], rcond=None)
    return name, basis @ weights


def detect(image: np.ndarray, min_match: float = MIN_MATCH) -> Reading:
    """Detect the background and the objects of a scene.

    Args:
        image: uint8 (h, w, 3), RGB.
        min_match: leave out blobs that match every shape less well than this; 0 keeps every blob, where only colour and
            position matter.
    """
    smooth = cv2.medianBlur(image, 3).astype(np.float32)
    background, level = _background(smooth)
    away = np.linalg.norm(smooth - level, axis=-1)  # (h, w)
    palette = np.asarray(list(COLORS.values()), np.float32)
    distance = np.linalg.norm(smooth[..., None, :] - palette, axis=-1)  # (h, w, 8)
    nearest = distance.argmin(-1)
    foreground = away > 45
    blobs = _blobs(foreground, nearest, (distance.min(-1) < 0.9 * away) & foreground)
    objects = []
    for blob, shape, match in _whole(blobs, foreground):
        if match < min_match:
            continue
        votes = np.bincount(nearest[cv2.erode(blob, np.ones((3, 3), np.uint8)) > 0], minlength=len(COLORS))
        objects.append(Detection(shape, list(COLORS)[int(votes.argmax())], box_around(blob), match))
    objects.sort(key=lambda o: -(o.box[2] - o.box[0]) * (o.box[3] - o.box[1]))
    return Reading(background, tuple(objects))


@lru_cache(maxsize=2)  # several metrics read one image, or alternate between it and the base's
def _objects(pixels: bytes, shape: tuple[int, ...]) -> tuple[Detection, ...]:
    return detect(np.frombuffer(pixels, np.uint8).reshape(shape)).objects


def find_objects(image: np.ndarray, labels: Sequence[str] = ()) -> list[Found]:
    """Detect the objects of a scene (a :class:`localctl.boxes.Detector`); labels are phrases such as "red circle"."""
    return [Found(item.phrase, item.box, item.match) for item in _objects(image.tobytes(), image.shape)]


def find_shapes(image: np.ndarray, labels: Sequence[str] = ()) -> list[Found]:
    """Detect objects as :func:`find_objects`, labelled "circle" etc. by shape only, for conditions without colour."""
    return [Found(item.shape, item.box, item.match) for item in _objects(image.tobytes(), image.shape)]


def truth_of(item: Scene) -> Truth:
    """Return the objects and the relation of the scene ``item``, with this reader as the detector."""
    relation = None
    if item.relation is not None:
        first, name, second = item.relation
        relation = (item.objects[first].phrase, name, item.objects[second].phrase)
    objects = tuple(Found(o.phrase, o.box) for o in item.objects)
    shapes = tuple(Found(o.shape, o.box) for o in item.objects)
    return Truth(objects, shapes, relation, find_objects, find_shapes)


def _blobs(foreground: np.ndarray, nearest: np.ndarray, certain: np.ndarray) -> list[np.ndarray]:
    """Segment blobs of one colour, uint8 (h, w) each: cores, grown by their blended rim.

    The rim between white and red is pink. Morphological opening removes such rims, so that none becomes an object.
    """
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


def _whole(blobs: list[np.ndarray], foreground: np.ndarray) -> list[tuple[np.ndarray, str, float]]:
    """Return the blobs with shape and match.

    Touching blobs are merged where their union matches a shape better than each of them, as in a ring of two colours.
    """
    found = [(blob, *classify_shape(blob)) for blob in blobs]
    _, labels = cv2.connectedComponents(foreground.astype(np.uint8), connectivity=4)
    together: dict[int, list[int]] = {}
    for i, blob in enumerate(blobs):
        together.setdefault(int(np.bincount(labels[blob > 0]).argmax()), []).append(i)
    result = []
    for label, parts in together.items():
        if len(parts) > 1:
            whole = (labels == label).astype(np.uint8)
            shape, match = classify_shape(whole)
            if match >= max(MIN_WHOLE, *(found[i][2] for i in parts)):
                result.append((whole, shape, match))
                continue
        result += [found[i] for i in parts]
    return result
