"""Measure a layout predictor on held-out micro scenes: relations, overlap, likelihood.

  python -m research.layout_predictor.report --output report.json

Every layout is predicted from the words alone. Intervals are 95 %, bootstrapped over sentences.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from localctl.cli.arguments import Arguments
from localctl.cli.program import one_sentence
from localctl.layout_predictor.model import LayoutPredictor, load_predictor
from localctl.metrics.bootstrap import bootstrap
from localctl.seeding import numpy_rng
from research.layout_predictor.captions import MARGIN, Caption, PlacedScene, own_caption
from research.layout_predictor.data import MicroLayouts, Scenes
from research.layout_predictor.measure import Judged, MeanBox, held_out_captions, judge, predictor_nll
from research.page import table

PROGRAM = "research.layout_predictor.report"

# Things that no training sentence names; most are none of COCO's classes either.
NEW_NAMES = (
    "silver bed", "white couch", "lighthouse", "old sailboat", "axolotl", "brass trombone", "cup of coffee",
    "windmill", "Quokka", "girl's hat", "Eiffel Tower", "bonsai", "paper lantern", "hedgehog", "accordion",
    "pair of shoes", "igloo", "origami crane", "typewriter", "jellyfish", "rubber duck", "cactus", "knight's helmet",
    "hot-air balloon",
)  # fmt: skip
_SCENES = 10**6  # the supply of scenes; only those needed are made
_BASELINE = 500  # scenes of training for the mean box


class NewNames:
    """Scenes with names that training never saw."""

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
    """Name -> sentences; those of ``lists`` state no relation."""
    renamed = NewNames(scenes, seed)
    return {
        "own captions": own_captions(scenes, count),
        "families of training": held_out_captions(scenes, count, "training", seed, MARGIN),
        "unseen families": held_out_captions(scenes, count, "held_out", seed, MARGIN),
        "unseen families, unseen things": held_out_captions(renamed, count, "held_out", seed, MARGIN),
        "lists": held_out_captions(scenes, count, "list", seed, MARGIN),
    }


def summary(judged: Sequence[Judged], captions: Sequence[Caption], seed: int) -> dict[str, Any]:
    """Of one set: shares of relations that hold, of sentences parsed as meant and of layouts whose boxes are inside,
    the largest overlap and the share of layouts with one of 10 % or more."""
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
    """All figures: ``sets`` for the most likely layouts, ``drawn`` with ``seed`` of a quarter of them, ``nll``."""
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


@one_sentence(PROGRAM)
def main(argv: Sequence[str] | None = None) -> int:
    """0 when done; 2 with one sentence on stderr for bad input, 1 for an --output that cannot be written."""
    parser = Arguments(PROGRAM, __doc__)
    parser.add_argument("--predictor", metavar="DIR", help="default: the shipped one")
    parser.add_argument("--count", type=int, default=1000, help="sentences per set")
    parser.add_argument("--seed", type=int, default=0, help="of the sentences")
    parser.add_argument("--output", metavar="FILE", help="also write the figures as JSON")
    options = parser.read(argv)
    if options.count < 1:
        raise ValueError(f"--count must be at least 1, not {options.count}.")
    result = measure(load_predictor(options.predictor), options.count, options.seed)
    print(as_text(result))
    if options.output:
        Path(options.output).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
