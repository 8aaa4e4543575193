"""The objects of training scenes on the grid of latents, and their words; light, as many processes load this file."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import cv2
import numpy as np

from localctl.micro.scenes import SIZE, Scene, ScenePlan, scene_plan
from localctl.micro.shapes import COLORS, SHAPES, shape_mask
from research.micro_base.data import Job

MOST_OBJECTS = 3
SIDE = 16  # of the grid of latents
SIDES = {"left": (0, 1), "right": (1, 0), "above": (2, 3), "below": (3, 2)}  # of the first and of the second object
NEAR = 17  # pixels; side of the kernel that dilates objects to the area with a larger weight


@dataclass(frozen=True)
class Objects:
    """Objects of n basic scenes.

    masks: float16 (n, 3, 16, 16), of each. near: float16 (n, 16, 16), the area around all. tokens: (n, 3), position of
    each object's colour in the caption, which its shape follows, or -1. relations: (n,), position of the relation's
    word, or -1. numbers: (n,), how many. named: bool (n,), whether the caption names the background.
    """

    masks: np.ndarray
    near: np.ndarray
    tokens: np.ndarray
    relations: np.ndarray
    numbers: np.ndarray
    named: np.ndarray


def tokens_of(item: Scene | ScenePlan) -> list[int]:
    """Return where each object's colour and shape are in the caption: position of the first, or -1; 0 = start token."""
    words = item.caption.replace(",", " ,").split()
    pairs = list(itertools.pairwise(words))
    return [pairs.index((o.color, o.shape)) + 1 if (o.color, o.shape) in pairs else -1 for o in item.objects]


def roles_of(caption: str) -> tuple[int, int, int, str] | None:
    """Return the positions of the first object's colour, the relation's word and the second object's colour, and this
    word; None for a caption without a relation of two objects. 0 is the start token; shapes follow their colours."""
    words = ["", *caption.replace(",", " ,").split()]
    objects = [i for i, (one, two) in enumerate(itertools.pairwise(words)) if one in COLORS and two in SHAPES]
    related = [i for i, word in enumerate(words) if word in SIDES]
    if len(objects) != 2 or len(related) != 1 or not objects[0] < related[0] < objects[1]:
        return None
    return objects[0], related[0], objects[1], words[related[0]]


def objects_of(job: Job) -> Objects:
    """Return the objects of a block of basic scenes, which never overlap, so that no image need be rendered."""
    profile, split, start, stop = job
    assert profile == "basic"
    count = stop - start
    found = Objects(
        np.zeros((count, MOST_OBJECTS, SIDE, SIDE), np.float16),
        np.zeros((count, SIDE, SIDE), np.float16),
        np.full((count, MOST_OBJECTS), -1),
        np.full(count, -1),
        np.zeros(count, int),
        np.zeros(count, bool),
    )
    for i in range(count):
        plan = scene_plan(start + i, profile, split)
        shapes = [shape_mask(o.shape, o.center, o.radius, o.angle, SIZE) for o in plan.objects]
        found.near[i] = _coarse(cv2.dilate(np.max(shapes, axis=0), np.ones((NEAR, NEAR))))
        found.masks[i, : len(shapes)] = [_coarse(shape) for shape in shapes]
        found.tokens[i, : len(shapes)] = tokens_of(plan)
        roles = roles_of(plan.caption)
        found.relations[i] = roles[1] if roles else -1
        found.numbers[i], found.named[i] = len(shapes), "background" in plan.caption
    return found


def _coarse(mask: np.ndarray) -> np.ndarray:
    return cv2.resize(mask, (SIDE, SIDE), interpolation=cv2.INTER_AREA)
