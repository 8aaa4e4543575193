"""Placed scenes to learn from, micro scenes here and COCO's annotations in ``coco``, and training examples of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from localctl.micro.scenes import RELATIONS, SIZE, scene_plan
from localctl.seeding import numpy_rng
from research.layout_predictor.captions import Caption, PlacedScene, describe, mirrored, own_caption, renamed
from research.layout_predictor.settings import CaptionSettings

SIDES = dict(zip(RELATIONS, ("left", "right", "above", "below"), strict=True))


class Scenes(Protocol):
    """Placed scenes by number. symmetries: allowed flips, letters of x, y and t (x and y swapped)."""

    name: str
    symmetries: str

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> PlacedScene: ...


class MicroLayouts:
    """Boxes and captions of the micro scenes, computed without rendering, and cached.

    crowded: item i is whichever of the scenes 2 i and 2 i + 1 has more objects, so that most items have relations.
    """

    name = "micro"
    symmetries = "xyt"

    def __init__(self, split: str, count: int, crowded: bool = False) -> None:
        self.split, self.count, self.crowded = split, count, crowded
        self._made: dict[int, PlacedScene] = {}

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> PlacedScene:
        if index not in self._made:
            numbers = (2 * index, 2 * index + 1) if self.crowded else (index,)
            several = [micro_layout(number, self.split) for number in numbers]
            self._made[index] = max(several, key=lambda item: len(item.names))
        return self._made[index]


def micro_layout(index: int, split: str) -> PlacedScene:
    """Return micro scene number ``index`` of a split as a placed scene."""
    plan = scene_plan(index, "basic", split)
    corners = np.array([item.box for item in plan.objects]) / SIZE  # (n,4) xyxy
    boxes = np.concatenate([(corners[:, :2] + corners[:, 2:]) / 2, corners[:, 2:] - corners[:, :2]], axis=1)
    relation = None
    if plan.relation is not None:
        first, words, second = plan.relation
        relation = (first, SIDES[words], second)
    names = tuple(item.phrase for item in plan.objects)
    return PlacedScene(f"{split}-{index}", names, boxes, plan.caption, relation)


def example(scenes: Scenes, index: int, visit: int, settings: CaptionSettings, seed: int) -> Caption:
    """Return the sentence that training uses at the ``visit``-th visit of scene ``index``."""
    scene = scenes[index]
    keys = (scene.key, visit if settings.variants is None else visit % settings.variants)
    rng = numpy_rng(seed, "caption", *keys)
    if scene.caption is not None and rng.random() < settings.own:
        return own_caption(scene)
    if settings.mirror:
        flips = [letter in scenes.symmetries and bool(rng.random() < 0.5) for letter in "xyt"]
        scene = mirrored(scene, *flips)
    if rng.random() < settings.rename:
        scene = renamed(scene, seed, *keys, rng=rng)
    kind = "list" if rng.random() < settings.lists else "training"
    return describe(scene, rng, kind, settings.margin)


def targets(captions: Sequence[Caption]) -> Tensor:
    """Return the boxes of the things of each sentence, (B, N, 4) float32, zeros where a sentence has fewer."""
    boxes = torch.zeros(len(captions), max(len(item.spans) for item in captions), 4)
    for row, item in zip(boxes, captions, strict=True):
        row[: len(item.spans)] = torch.from_numpy(item.boxes)
    return boxes
