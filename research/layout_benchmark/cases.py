"""Held-out layouts with their objects, and the figures of a generated image."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from localctl.layout import Layout, Region
from localctl.metrics.detection import Found, best_matches
from localctl.metrics.regions import check_image
from localctl.micro.detect import MIN_MATCH, detect
from localctl.micro.scenes import SIZE, Scene, article, scene
from research.harness import PROFILE
from research.harness import Case as BaseCase

REGIONS = (2, 1, 2, 3)  # number of regions of the layouts, in turn; the gates are for two
THRESHOLD = 0.5  # least IoU of an object that counts as in its box

COLUMNS = (
    "right",  # 1 if every object is there and in its box
    "accuracy",  # share of objects that are there and in their boxes
    "iou",  # mean over objects of the IoU with the box; 0 where there is none
    "present",  # share of objects that are there, at any place
    "binding",  # of the objects whose colour and shape are both in the image, the share that has them together
    "color_right",  # these three are for blobs of the right colour, of any shape
    "color_accuracy",
    "color_iou",
)


@dataclass(frozen=True)
class Case(BaseCase):
    """A held-out layout. objects: the colour and shape of the object in each region."""

    objects: tuple[tuple[str, str], ...]

    @property
    def boxes(self) -> list[tuple[float, float, float, float]]:
        """The boxes of the regions, xyxy in pixels."""
        return [tuple(side * SIZE for side in region.boxes[0]) for region in self.layout.regions]  # type: ignore[misc]


def cases(count: int, split: str, regions: Sequence[int] = REGIONS) -> list[Case]:
    """Return the first ``count`` layouts of a split (``test``, or ``val`` for tuning).

    Their numbers of regions alternate as in ``regions``. Objects and boxes are those of micro scenes: all different,
    without overlap, of sizes that the base was trained on. The prompt names them and the background, not their places.
    """
    found: list[Case] = []
    waiting: dict[int, list[Scene]] = {number: [] for number in regions}
    index = 0
    while len(found) < count:
        wanted = regions[len(found) % len(regions)]
        while not waiting[wanted]:
            item = scene(index, PROFILE, split)
            index += 1
            if len(item.objects) in waiting:
                waiting[len(item.objects)].append(item)
        found.append(_case(waiting[wanted].pop(0), split))
    return found


def _case(item: Scene, split: str) -> Case:
    phrases = [article(thing.phrase) for thing in item.objects]
    listed = phrases[0] if len(phrases) == 1 else f"{', '.join(phrases[:-1])} and {phrases[-1]}"
    regions = []
    for thing in item.objects:
        left, top, right, bottom = (side / SIZE for side in thing.box)
        regions.append(Region(thing.phrase, (left, top, right, bottom)))
    layout = Layout(f"{listed} on {article(item.background)} background", SIZE, SIZE, tuple(regions))
    objects = tuple((thing.color, thing.shape) for thing in item.objects)
    return Case(f"{split}-{item.index}", item, layout, 0, objects)


def read(image: np.ndarray, case: Case) -> tuple[float, ...]:
    """Return the ``COLUMNS`` of an image uint8 (128,128,3); NaN where undefined."""
    check_image(image)
    everything = detect(image, min_match=0.0).objects  # a blob of no known shape still has a colour
    things = [thing for thing in everything if thing.match >= MIN_MATCH]
    phrases = [Found(f"{color} {shape}", box) for (color, shape), box in zip(case.objects, case.boxes, strict=True)]
    matches = best_matches(phrases, [Found(thing.phrase, thing.box) for thing in things])
    ious = [match or 0.0 for match in matches]
    colors = [Found(color, box) for (color, _), box in zip(case.objects, case.boxes, strict=True)]
    blobs = [Found(blob.color, blob.box) for blob in everything]
    color_ious = [match or 0.0 for match in best_matches(colors, blobs)]
    there = {thing.phrase for thing in things}
    bound = [
        f"{color} {shape}" in there
        for color, shape in case.objects
        if any(thing.color == color for thing in things) and any(thing.shape == shape for thing in things)
    ]
    return (
        *_placed(ious),
        float(np.mean(ious)),
        float(np.mean([match is not None for match in matches])),
        float(np.mean(bound)) if bound else math.nan,
        *_placed(color_ious),
        float(np.mean(color_ious)),
    )


def _placed(ious: Sequence[float]) -> tuple[float, float]:
    """Return whether all IoUs reach the threshold, as 0 or 1, and the share that do."""
    hits = [iou >= THRESHOLD for iou in ious]
    return float(all(hits)), float(np.mean(hits))
