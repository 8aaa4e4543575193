"""Measure predicted layouts: stated relations that hold, boxes inside the image and apart, likelihood of true boxes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from localctl.layout_predictor.model import LayoutPredictor
from localctl.layout_predictor.parsing import parse
from localctl.layout_predictor.placing import Placement
from localctl.metrics.bootstrap import bootstrap
from localctl.seeding import numpy_rng
from research.layout_predictor.captions import MARGIN, Caption, PlacedScene, describe, own_caption, satisfied
from research.layout_predictor.data import MicroLayouts, Scenes
from research.layout_predictor.learning import likelihood
from research.page import table

_BATCH = 64
# Things that no training sentence names; most are not classes of COCO either.
NEW_NAMES = (
    "silver bed", "white couch", "lighthouse", "old sailboat", "axolotl", "brass trombone", "cup of coffee",
    "windmill", "Quokka", "girl's hat", "Eiffel Tower", "bonsai", "paper lantern", "hedgehog", "accordion",
    "pair of shoes", "igloo", "origami crane", "typewriter", "jellyfish", "rubber duck", "cactus", "knight's helmet",
    "hot-air balloon",
)  # fmt: skip
_SCENES = 10**6  # more than enough; scenes are made on demand
_BASELINE = 500  # training scenes for the mean box


def held_out_captions(scenes: Scenes, count: int, kind: str, seed: int, margin: float) -> list[Caption]:
    """Return the first ``count`` suitable sentences of this ``kind`` (see ``describe``), in the order of the scenes.

    Suitable are sentences that state a relation; for kind ``list``, sentences about several things.
    """
    found: list[Caption] = []
    for index in range(len(scenes)):
        if len(found) == count:
            break
        scene = scenes[index]
        caption = describe(scene, numpy_rng(seed, "held out", kind, scene.key), kind, margin)
        if caption.relations or (kind == "list" and len(caption.spans) > 1):
            found.append(caption)
    return found


@dataclass(frozen=True)
class Judged:
    """How well a predicted layout fits its sentence.

    parsed: whether the objects found are those of the sentence. relations: number stated. held: number of them that
    hold for the centres. overlap: largest share of a box covered by another. inside: whether all boxes are in the
    image.
    """

    parsed: bool
    relations: int
    held: int
    overlap: float
    inside: bool


def judge(model: LayoutPredictor, caption: Caption, seed: int | None = None) -> Judged:
    """Predict a layout from the words alone, and judge it. Relations of objects that were not found do not hold."""
    objects = parse(caption.text, "rules")
    placed = model.place_objects(caption.text, objects, seed)
    by_span = {item.span: own[0] for item, own in zip(objects, placed, strict=True)}
    held = 0
    for first, side, second in caption.relations:
        pair = [by_span.get(caption.spans[index]) for index in (first, second)]
        if pair[0] is not None and pair[1] is not None:
            centres = [(box.x, box.y) for box in pair if box is not None]
            held += satisfied((0, side, 1), centres)
    boxes = [box for own in placed for box in own]
    parsed = tuple(by_span) == caption.spans
    return Judged(parsed, len(caption.relations), held, largest_overlap(boxes), all(map(is_inside, boxes)))


def relation_rate(model: LayoutPredictor, captions: Sequence[Caption], seed: int | None = None) -> float:
    """Return the share of stated relations that hold in the predicted layouts."""
    judged = [judge(model, caption, seed) for caption in captions]
    return sum(item.held for item in judged) / max(1, sum(item.relations for item in judged))


def largest_overlap(boxes: Sequence[Placement]) -> float:
    """Return the largest share, 0 to 1, of any box that is covered by one other box."""
    most = 0.0
    for index, one in enumerate(boxes):
        for other in boxes[:index]:
            wide = (one.width + other.width) / 2 - abs(one.x - other.x)
            high = (one.height + other.height) / 2 - abs(one.y - other.y)
            common = max(0.0, min(wide, one.width, other.width)) * max(0.0, min(high, one.height, other.height))
            most = max(most, common / min(one.width * one.height, other.width * other.height))
    return most


def is_inside(box: Placement) -> bool:
    """Return whether a box is inside the image, up to rounding."""
    low = min(box.x - box.width / 2, box.y - box.height / 2)
    return low >= -1e-5 and max(box.x + box.width / 2, box.y + box.height / 2) <= 1 + 1e-5


@dataclass(frozen=True)
class MeanBox:
    """A baseline without text: one Gaussian for all centres, and one for the logarithms of all sizes."""

    centre: np.ndarray  # (2,) mean
    centre_sigma: np.ndarray
    log_size: np.ndarray
    log_size_sigma: np.ndarray

    @classmethod
    def fit(cls, captions: Sequence[Caption]) -> MeanBox:
        """Return the baseline for the boxes of ``captions``."""
        boxes = np.concatenate([item.boxes for item in captions])
        sizes = np.log(boxes[:, 2:])
        return cls(boxes[:, :2].mean(axis=0), boxes[:, :2].std(axis=0), sizes.mean(axis=0), sizes.std(axis=0))

    def nll(self, captions: Sequence[Caption]) -> tuple[float, float]:
        """Return the mean negative log-likelihood per object of centres and of the logarithms of sizes, in nats."""
        boxes = np.concatenate([item.boxes for item in captions])
        values = (
            (boxes[:, :2], self.centre, self.centre_sigma),
            (np.log(boxes[:, 2:]), self.log_size, self.log_size_sigma),
        )
        centre, size = (
            float((0.5 * ((x - mean) / sigma) ** 2 + np.log(sigma) + 0.5 * math.log(2 * math.pi)).sum(axis=1).mean())
            for x, mean, sigma in values
        )
        return centre, size


@torch.no_grad()
def predictor_nll(model: LayoutPredictor, captions: Sequence[Caption]) -> tuple[float, float]:
    """Return the same for the predictor, by the chain rule: each object given the true boxes of those before it."""
    centre, size, total = 0.0, 0.0, 0
    widest = max(len(item.spans) for item in captions)
    for index in range(widest):
        several = [item for item in captions if len(item.spans) > index]
        for start in range(0, len(several), _BATCH):
            batch = several[start : start + _BATCH]
            places = torch.arange(max(len(item.spans) for item in batch))
            known, only = ((relation(places, index)).expand(len(batch), -1) for relation in (torch.lt, torch.eq))
            result = likelihood(model, batch, known, only=only)
            centre, size = centre + float(result.centre) * result.count, size + float(result.size) * result.count
            total += result.count
    return centre / total, size / total


class NewNames:
    """Scenes whose things have names that training never used."""

    symmetries = ""

    def __init__(self, scenes: Scenes, seed: int) -> None:
        self.scenes, self.seed, self.name = scenes, seed, f"{scenes.name} renamed"

    def __len__(self) -> int:
        return len(self.scenes)

    def __getitem__(self, index: int) -> PlacedScene:
        scene = self.scenes[index]
        order = numpy_rng(self.seed, "new names", scene.key).permutation(len(NEW_NAMES))
        names = tuple(NEW_NAMES[i] for i in order[: len(scene.names)])
        return replace(scene, names=names, caption=None, relation=None)


def own_captions(scenes: Scenes, count: int) -> list[Caption]:
    """Return the first ``count`` of the scenes' own sentences that state a relation."""
    found: list[Caption] = []
    for index in range(len(scenes)):
        if len(found) == count:
            break
        if scenes[index].relation is not None:
            found.append(own_caption(scenes[index]))
    return found


def sentence_sets(scenes: Scenes, count: int, seed: int) -> dict[str, list[Caption]]:
    """Return the test sentences by set; those of ``lists`` state no relation."""
    renamed = NewNames(scenes, seed)
    return {
        "own captions": own_captions(scenes, count),
        "families of training": held_out_captions(scenes, count, "training", seed, MARGIN),
        "unseen families": held_out_captions(scenes, count, "held_out", seed, MARGIN),
        "unseen families, unseen things": held_out_captions(renamed, count, "held_out", seed, MARGIN),
        "lists": held_out_captions(scenes, count, "list", seed, MARGIN),
    }


def summary(judged: Sequence[Judged], captions: Sequence[Caption], seed: int) -> dict[str, Any]:
    """Return the figures of one set.

    These are the shares of relations that hold, of sentences parsed correctly and of layouts with all boxes inside the
    image, the largest overlap, and the share of layouts with an overlap of 10 % or more.
    """
    row: dict[str, Any] = {
        "sentences": len(judged),
        "parsed": float(np.mean([item.parsed for item in judged])),
        "inside": float(np.mean([item.inside for item in judged])),
        "largest_overlap": max(item.overlap for item in judged),
        "overlap_10_percent": float(np.mean([item.overlap >= 0.1 for item in judged])),
    }
    if any(item.relations for item in judged):
        counts = np.array([(item.held, item.relations) for item in judged])
        found = bootstrap(counts, _rate, seed=seed)
        row |= {"relations": found.value, "interval": [found.low, found.high]}
        families = sorted({item.family for item in captions})
        chosen = {name: [i for i, item in enumerate(captions) if item.family == name] for name in families}
        row["families"] = {name: (_rate(counts[rows]), len(rows)) for name, rows in chosen.items()}
    return row


def _rate(counts: np.ndarray) -> float:
    return float(counts[:, 0].sum() / counts[:, 1].sum())


def measure(model: LayoutPredictor, count: int, seed: int) -> dict[str, Any]:
    """Return all figures, for ``count`` sentences per set.

    They are ``sets`` for the most likely layouts, ``drawn`` for layouts sampled with ``seed`` for a quarter of the
    sentences, and ``nll``, the negative log-likelihoods.
    """
    sets = sentence_sets(MicroLayouts("test", _SCENES), count, seed)
    result: dict[str, Any] = {"count": count, "seed": seed, "sets": {}, "drawn": {}}
    for kind, noise_seed, number in (("sets", None, count), ("drawn", seed, -(-count // 4))):
        for name, captions in ((name, several[:number]) for name, several in sets.items()):
            judged = [judge(model, item, noise_seed) for item in tqdm(captions, desc=name, mininterval=2, leave=False)]
            result[kind][name] = summary(judged, captions, seed)
    training = MicroLayouts("train", _BASELINE)
    baseline = MeanBox.fit([own_caption(training[index]) for index in range(_BASELINE)])
    test = {name: sets[name] for name in ("own captions", "families of training", "unseen families", "lists")}
    result["nll"] = {
        name: {"predictor": predictor_nll(model, captions), "mean box": baseline.nll(captions)}
        for name, captions in test.items()
    }
    return result


def as_text(result: dict[str, Any]) -> str:
    """Return the figures as Markdown tables."""
    rows = []
    for kind, label in (("sets", "most likely"), ("drawn", "sampled")):
        for name, row in result[kind].items():
            rate = "-"
            if "relations" in row:
                rate = f"{row['relations']:.1%} [{row['interval'][0]:.1%}, {row['interval'][1]:.1%}]"
            shares = [f"{row[key]:.1%}" for key in ("parsed", "inside", "largest_overlap")]
            rows.append((f"{name} ({row['sentences']})", [label, rate, *shares]))
    families = result["sets"]["unseen families"]["families"].items()
    nats = []
    for name, row in result["nll"].items():
        (centre, size), (base_centre, base_size) = row["predictor"], row["mean box"]
        nats.append((name, [f"{value:.3f}" for value in (centre, base_centre, size, base_size)]))
    lines = [
        *table(("layouts", "relations hold", "parsed as meant", "boxes inside", "largest overlap"), rows, "sentences"),
        "",
        *table(
            ("relations hold (most likely)", "sentences"),
            ((family, [f"{rate:.1%}", str(number)]) for family, (rate, number) in families),
            "unseen family",
        ),
        "",
        *table(("centre: predictor", "mean box", "size: predictor", "mean box"), nats, "nats per object"),
    ]
    return "\n".join(lines)
