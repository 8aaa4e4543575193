"""Procedural scenes with exact captions, masks, boxes and depth. Scene i is always the same image.

The profile `basic` must not change, because the project's results are measured on it. The profile `rich` adds
textures, overlap, counts and more objects, for variety in training.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

from localctl.boxes import RELATIONS as RELATIONS
from localctl.boxes import holds as holds
from localctl.micro import PROFILES as PROFILES
from localctl.micro import SPLITS as SPLITS
from localctl.micro.shapes import BACKGROUNDS, COLORS, MAX_ANGLE, SHAPES, shape_mask

SIZE = 128
_MIN_RADIUS, _MAX_RADIUS, _GAP = 13.0, 30.0, 4.0
_RELATION_MARGIN = 14.0  # smallest distance of centres, in pixels, along the axis of a relation


@dataclass(frozen=True)
class SceneObject:
    """An object of a scene. center, radius, box (xyxy): in pixels. angle: in degrees. depth: in (0, 1], 1 = nearest."""

    shape: str
    color: str
    center: tuple[float, float]
    radius: float
    angle: float
    box: tuple[float, float, float, float]
    depth: float
    texture: str = "flat"

    @property
    def phrase(self) -> str:
        """Colour and shape, as in the caption."""
        return f"{self.color} {self.shape}"


@dataclass(frozen=True)
class Scene:
    """A scene with everything that is known about it.

    relation: (index of the subject, relation, index of the object), where the caption states one. image: uint8
    (128, 128, 3), RGB. masks: visible part of each object, float32 (n, 128, 128) in [0, 1]. depth: float32 (128, 128)
    in [0, 1], 0 = background. segmentation: each object in its colour on black, uint8 (128, 128, 3).
    """

    index: int
    caption: str
    background: str
    objects: tuple[SceneObject, ...]
    relation: tuple[int, str, int] | None
    image: np.ndarray
    masks: np.ndarray
    depth: np.ndarray
    segmentation: np.ndarray


def article(phrase: str) -> str:
    """Put "a" or "an" before ``phrase``."""
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"


@dataclass(frozen=True)
class ScenePlan:
    """A scene without its image: caption, background, objects and relation, as in :class:`Scene`."""

    caption: str
    background: str
    objects: tuple[SceneObject, ...]
    relation: tuple[int, str, int] | None


def scene_plan(index: int, profile: str = "basic", split: str = "train") -> ScenePlan:
    """Return caption and objects of scene `index`, the same as in :func:`scene`, without rendering the image."""
    return _plan(index, profile, split)[0]


def scene(index: int, profile: str = "basic", split: str = "train") -> Scene:
    """Render scene `index` of a profile and split; splits have no scene in common.

    ValueError for an unknown profile or split.
    """
    plan, rng = _plan(index, profile, split)
    caption, background, objects, relation = plan.caption, plan.background, plan.objects, plan.relation
    image, masks = _render(rng, objects, background)
    depth = np.zeros((SIZE, SIZE), np.float32)
    segmentation = np.zeros((SIZE, SIZE, 3), np.float32)
    for item, mask in zip(objects, masks, strict=True):
        depth += mask * item.depth
        segmentation += mask[..., None] * np.asarray(COLORS[item.color], np.float32)
    return Scene(
        index,
        caption,
        background,
        objects,
        relation,
        image,
        masks,
        depth.clip(0, 1),
        segmentation.round().astype(np.uint8),
    )


def render(index: int, objects: tuple[SceneObject, ...], profile: str = "basic", split: str = "train") -> np.ndarray:
    """Render scene `index` with other objects, on its own background; uint8 (128, 128, 3)."""
    plan, rng = _plan(index, profile, split)
    return _render(rng, objects, plan.background)[0]


def _plan(index: int, profile: str, split: str) -> tuple[ScenePlan, np.random.Generator]:
    """Return the plan, and the random generator in the state from which the scene is rendered."""
    if profile not in PROFILES:
        raise ValueError(f"Unknown scene profile {profile!r}; choose one of {', '.join(PROFILES)}.")
    if split not in SPLITS:
        raise ValueError(f"Unknown scene split {split!r}; choose one of {', '.join(SPLITS)}.")
    rng = np.random.default_rng([PROFILES.index(profile), SPLITS.index(split), index])
    background = str(rng.choice(list(BACKGROUNDS)))
    relation: tuple[int, str, int] | None
    if profile == "basic":
        objects = _place(rng, int(rng.choice(3, p=[0.35, 0.45, 0.2])) + 1, gap=_GAP)
        caption, relation = _caption(rng, objects, background)
    else:
        objects = _place(rng, int(rng.integers(1, 7)), gap=-12.0, max_radius=24.0, textured=True)
        if len(objects) < 3:
            caption, relation = _caption(rng, objects, background)
        else:
            caption, relation = _count_caption(rng, objects, background), None
    return ScenePlan(caption, background, objects, relation), rng


def _place(
    rng: np.random.Generator, count: int, gap: float, max_radius: float = _MAX_RADIUS, textured: bool = False
) -> tuple[SceneObject, ...]:
    """Place up to `count` objects by rejection sampling, farthest first.

    No two objects have the same colour and shape, unless they are textured.
    """
    objects: list[SceneObject] = []
    for _ in range(60 * count):
        if len(objects) == count:
            break
        shape, color = str(rng.choice(SHAPES)), str(rng.choice(list(COLORS)))
        radius = float(rng.uniform(_MIN_RADIUS, max_radius))
        x, y = (float(v) for v in rng.uniform(radius + 1, SIZE - radius - 1, 2))
        angle = float(rng.uniform(-MAX_ANGLE, MAX_ANGLE))
        free = all(np.hypot(x - o.center[0], y - o.center[1]) >= radius + o.radius + gap for o in objects)
        unlike = textured or all((shape, color) != (o.shape, o.color) for o in objects)
        if free and unlike:
            texture = str(rng.choice(("flat", "stripes", "dots"))) if textured else "flat"
            points = shape_mask(shape, (x, y), radius, angle, SIZE) > 0.5
            ys, xs = np.nonzero(points)
            box = (float(xs.min()), float(ys.min()), float(xs.max() + 1), float(ys.max() + 1))
            objects.append(SceneObject(shape, color, (x, y), radius, angle, box, 0.0, texture))
    order = rng.permutation(len(objects))
    near = [0.25 + 0.75 * (rank + 1) / len(objects) for rank in range(len(objects))]
    return tuple(
        SceneObject(o.shape, o.color, o.center, o.radius, o.angle, o.box, near[rank], o.texture)
        for rank, o in ((rank, objects[i]) for rank, i in enumerate(order))
    )


def _caption(
    rng: np.random.Generator, objects: tuple[SceneObject, ...], background: str
) -> tuple[str, tuple[int, str, int] | None]:
    """Write "a red circle above a blue star on a white background"; return the caption and its relation, if any."""
    phrases = [article(o.phrase) for o in objects]
    relation = None
    text = phrases[0] if len(phrases) == 1 else f"{', '.join(phrases[:-1])} and {phrases[-1]}"
    if len(objects) == 2 and rng.random() < 0.5:
        first, second = objects[0].center, objects[1].center
        true = [
            r
            for axis, pair in ((0, RELATIONS[:2]), (1, RELATIONS[2:]))
            if abs(first[axis] - second[axis]) >= _RELATION_MARGIN
            for r in pair
            if holds(r, first, second)
        ]
        if true:
            chosen = str(rng.choice(true))
            relation = (0, chosen, 1)
            text = f"{phrases[0]} {chosen} {phrases[1]}"
    if rng.random() < 0.7:
        text += f" on {article(background)} background"
    return text, relation


def _count_caption(rng: np.random.Generator, objects: tuple[SceneObject, ...], background: str) -> str:
    """Write "two red circles, a striped blue star and ..." for the rich profile."""
    words = ("", "", "two", "three", "four", "five", "six")
    counts: dict[tuple[str, str, str], int] = {}
    for o in objects:
        adjective = {"flat": "", "stripes": "striped ", "dots": "dotted "}[o.texture]
        counts[(adjective, o.color, o.shape)] = counts.get((adjective, o.color, o.shape), 0) + 1
    parts = []
    for (adjective, color, shape), n in counts.items():
        phrase = f"{adjective}{color} {shape}"
        plural = "es" if shape == "cross" else "s"
        parts.append(article(phrase) if n == 1 else f"{words[n]} {phrase}{plural}")
    text = parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
    return f"{text} on {article(background)} background" if rng.random() < 0.7 else text


def _texture(kind: str, color: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Render the fill of an object, float32 (128, 128, 3)."""
    fill = np.broadcast_to(color, (SIZE, SIZE, 3)).astype(np.float32)
    if kind == "flat":
        return fill
    yy, xx = np.mgrid[0:SIZE, 0:SIZE].astype(np.float32)
    period, turn = rng.uniform(6, 10), rng.uniform(0, np.pi)
    u, v = xx * np.cos(turn) + yy * np.sin(turn), -xx * np.sin(turn) + yy * np.cos(turn)
    wave = np.sin(2 * np.pi * u / period)
    if kind == "dots":
        wave = wave * np.sin(2 * np.pi * v / period) - 0.25
    dark = np.clip(wave * 2 + 0.5, 0, 1)[..., None]
    return fill * (1 - 0.45 * dark)


def _render(
    rng: np.random.Generator, objects: tuple[SceneObject, ...], background: str
) -> tuple[np.ndarray, np.ndarray]:
    """Render the image, uint8 (128, 128, 3), and the visible part of each object, float32 (n, 128, 128)."""
    yy, xx = np.mgrid[0:SIZE, 0:SIZE].astype(np.float32) / (SIZE - 1) - 0.5
    turn, slope = rng.uniform(0, 2 * np.pi), rng.uniform(4, 14)
    canvas = np.asarray(BACKGROUNDS[background], np.float32) + rng.uniform(-6, 6)
    canvas = canvas + (slope * (np.cos(turn) * xx + np.sin(turn) * yy))[..., None]  # (128, 128, 3)
    masks = np.zeros((len(objects), SIZE, SIZE), np.float32)
    for i, item in enumerate(objects):
        mask = shape_mask(item.shape, item.center, item.radius, item.angle, SIZE)
        color = np.asarray(COLORS[item.color], np.float32) + rng.uniform(-6, 6, 3)
        canvas = canvas * (1 - mask[..., None]) + _texture(item.texture, color, rng) * mask[..., None]
        masks[:i] *= 1 - mask  # later objects are nearer
        masks[i] = mask
    canvas = canvas + rng.normal(0, 1.5, canvas.shape)
    return np.clip(np.round(canvas), 0, 255).astype(np.uint8), masks


def sheet(scenes: list[Scene], columns: int = 8) -> np.ndarray:
    """Compose a sheet of the scenes' images for inspection, uint8 (rows*128, columns*128, 3)."""
    rows = -(-len(scenes) // columns)
    canvas = np.full((rows * SIZE, columns * SIZE, 3), 255, np.uint8)
    for i, item in enumerate(scenes):
        top, left = i // columns * SIZE, i % columns * SIZE
        canvas[top : top + SIZE, left : left + SIZE] = cv2.resize(item.image, (SIZE, SIZE))
    return canvas
