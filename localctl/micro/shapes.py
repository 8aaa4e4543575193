"""Render the shapes of the micro scenes; their eight shapes, eight colours and four backgrounds."""

from __future__ import annotations

import math

import cv2
import numpy as np

from localctl.lazy import moved_names

__getattr__ = moved_names(__name__, {"draw_mask": f"{__name__}:shape_mask"})

SHAPES = ("circle", "square", "triangle", "star", "ring", "cross", "diamond", "hexagon")
COLORS: dict[str, tuple[int, int, int]] = {
    "red": (220, 30, 40),
    "green": (30, 150, 60),
    "blue": (40, 70, 220),
    "yellow": (245, 225, 40),
    "purple": (125, 40, 165),
    "orange": (250, 130, 20),
    "cyan": (40, 205, 220),
    "pink": (250, 130, 190),
}
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (240, 240, 240),
    "gray": (128, 128, 128),
    "black": (16, 16, 16),
    "brown": (105, 65, 35),
}
MAX_ANGLE = 15.0  # degrees; slight, so that a rotated square is never a diamond
_SUPERSAMPLE = 4
_INNER = {"star": 0.45, "ring": 0.55}


def _polar(angles_deg: np.ndarray, radii: np.ndarray) -> np.ndarray:
    """Convert polar coordinates to points (n, 2); 0 degrees points up."""
    angles = np.deg2rad(angles_deg)
    return np.stack([radii * np.sin(angles), -radii * np.cos(angles)], axis=1)


def outline(shape: str, inner: float | None = None) -> np.ndarray:
    """Return the corners (n, 2) of `shape` with circumscribed radius 1, not rotated. Circles and rings are 64-gons.

    inner: radius of the inner corners of a star; None: the default. ValueError for an unknown shape.
    """
    if shape in ("circle", "ring"):
        return _polar(np.arange(64) * 360 / 64, np.ones(64))
    if shape == "square":
        return _polar(np.array([45.0, 135, 225, 315]), np.ones(4))
    if shape == "triangle":
        return _polar(np.array([0.0, 120, 240]), np.ones(3))
    if shape == "hexagon":
        return _polar(np.arange(6) * 60.0 + 30, np.ones(6))
    if shape == "diamond":
        return np.array([[0.0, -1.0], [0.62, 0.0], [0.0, 1.0], [-0.62, 0.0]])
    if shape == "star":
        return _polar(np.arange(10) * 36.0, np.where(np.arange(10) % 2 == 0, 1.0, inner or _INNER["star"]))
    if shape == "cross":
        w = 0.33  # half the arm's width
        r = math.sqrt(1 - w * w)
        quarter = [(-w, -r), (w, -r), (w, -w), (r, -w), (r, w), (w, w), (w, r), (-w, r), (-w, w), (-r, w), (-r, -w)]
        return np.array([*quarter, (-w, -w)])
    raise ValueError(f"Unknown shape {shape!r}; choose one of {', '.join(SHAPES)}.")


def shape_mask(
    shape: str, center: tuple[float, float], radius: float, angle: float, size: int, inner: float | None = None
) -> np.ndarray:
    """Render the anti-aliased mask of a shape: float32 (size, size) in [0, 1].

    Args:
        center: (x, y) in pixels.
        radius: circumscribed radius in pixels.
        angle: clockwise rotation in degrees.
        inner: radius of a star's inner corners or of a ring's hole, in units of ``radius``; None: the default.
    """
    cos, sin = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    rotation = np.array([[cos, sin], [-sin, cos]])
    points = outline(shape, inner) @ rotation * radius + np.asarray(center)
    canvas = np.zeros((size * _SUPERSAMPLE, size * _SUPERSAMPLE), np.uint8)
    fixed = [np.round((points * _SUPERSAMPLE - 0.5) * 16).astype(np.int32)]  # 4 fractional bits
    cv2.fillPoly(canvas, fixed, (255,), shift=4)
    if shape == "ring":
        hole = (points - np.asarray(center)) * (inner or _INNER["ring"]) + np.asarray(center)
        cv2.fillPoly(canvas, [np.round((hole * _SUPERSAMPLE - 0.5) * 16).astype(np.int32)], (0,), shift=4)
    return cv2.resize(canvas, (size, size), interpolation=cv2.INTER_AREA).astype(np.float32) / 255
