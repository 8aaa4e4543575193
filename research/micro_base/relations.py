"""Measure whether a base uses the relation of a caption: in its text states, its prediction, and its images."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from localctl.metrics.bootstrap import Interval, bootstrap
from localctl.micro.detect import detect
from localctl.micro.scenes import RELATIONS, Scene, article
from localctl.micro.shapes import BACKGROUNDS, COLORS, SHAPES
from localctl.pipelines import BaseConfig, encode_captions, load_pipeline, set_scheduler
from research.harness import first_scenes
from research.micro_base.measure import GUIDANCE as GUIDANCE
from research.micro_base.measure import SCHEDULER, generate_captions
from research.micro_base.word_errors import predictions

OPPOSITE = dict(zip(RELATIONS, (RELATIONS[1], RELATIONS[0], RELATIONS[3], RELATIONS[2]), strict=True))
STEPS = 15  # of the images
RIDGE = 1e-3  # of the probes, relative to the mean square of the states
Pair = tuple[tuple[str, str], tuple[str, str]]  # colour and shape of the first and of the second object


def caption(pair: Pair, relation: str, background: str) -> str:
    """Return a caption of two objects, of which the first has the relation to the second."""
    first, second = (article(" ".join(words)) for words in pair)
    return f"{first} {relation} {second} on {article(background)} background"


def pair_of(item: Scene) -> Pair:
    """Return colours and shapes of a scene's two objects."""
    (first, second) = ((o.color, o.shape) for o in item.objects)
    return first, second


def is_related(item: Scene) -> bool:
    """Return whether the caption states a relation between objects of different colours."""
    return item.relation is not None and item.objects[0].color != item.objects[1].color


def places_of(relation: str) -> dict[str, int]:
    """Return the positions of a caption's words that may tell of its relation; 0 is the start token."""
    words = relation.split()
    last = 3 + len(words)  # after the start token, "a", colour and shape
    told = 4 + (2 if len(words) > 1 else 0)
    return {
        "first object's shape": 3,
        "relation": told,
        "second object's colour": last + 2,
        "second object's shape": last + 3,
        "end": last + 8,
        "last padding": -1,
    }


def probe(states: Tensor, classes: Tensor, held_out: int) -> float:
    """Return the accuracy of a linear probe (ridge regression) on the last ``held_out`` of (N, D) states."""
    x = torch.cat([states, torch.ones(len(states), 1)], 1).double()
    wanted = F.one_hot(classes).double()
    fit, target = x[:-held_out], wanted[:-held_out]
    penalty = RIDGE * len(fit) * fit.square().mean() * torch.eye(x.shape[1], dtype=x.dtype)
    weights = torch.linalg.solve(fit.T @ fit + penalty, fit.T @ target)
    return float(((x[-held_out:] @ weights).argmax(1) == classes[-held_out:]).double().mean())


def probe_states(pipe: Any, axis: int, count: int = 4000) -> dict[str, tuple[float, float]]:
    """Return, for words of captions with one of the two relations of an axis (0: left and right, 1: above and below),
    how well their states tell the relation: accuracy of a linear probe on a quarter of the captions (chance 0.5), and
    the share of the states' variance that the relation explains."""
    rng = np.random.default_rng([axis, count])
    captions, sides = [], rng.integers(2, size=count)
    for side in sides:
        one, two = rng.choice(list(COLORS), 2, replace=False)
        shapes = rng.choice(SHAPES, 2)
        pair = (str(one), str(shapes[0])), (str(two), str(shapes[1]))
        captions.append(caption(pair, RELATIONS[2 * axis + int(side)], str(rng.choice(list(BACKGROUNDS)))))
    states = torch.cat([encode_captions(pipe, captions[i : i + 200]).states for i in range(0, count, 200)])
    classes = torch.from_numpy(sides)
    found = {}
    for name, place in places_of(RELATIONS[2 * axis]).items():
        own = states[:, place]
        means = torch.stack([own[classes == side].mean(0) for side in (0, 1)])
        share = float(means.var(0, correction=0).sum() / own.var(0, correction=0).sum())
        found[name] = probe(own, classes, count // 4), share
    return found


def changes(item: Scene) -> dict[str, str]:
    """Return the caption of a scene, with its relation replaced by the opposite, and with its colours swapped."""
    assert item.relation is not None
    first, second = pair_of(item)
    swapped = (second[0], first[1]), (first[0], second[1])
    relation = item.relation[1]
    return {
        "true": caption((first, second), relation, item.background),
        "relation": caption((first, second), OPPOSITE[relation], item.background),
        "colours": caption(swapped, relation, item.background),
        "background": caption((first, second), relation, next(name for name in BACKGROUNDS if name != item.background)),
    }


def use_of_relations(
    pipe: Any, scenes: Sequence[Scene], timestep: int
) -> dict[str, tuple[Interval, Interval, Interval]]:
    """Return for each change of the caption: how often the true one has the smaller error, the relative increase of
    the error by the change, and the root of the mean squared change of z0'."""
    rows: dict[str, list[tuple[float, float, float]]] = {}
    for item in scenes:
        texts = changes(item)
        error, z0 = predictions(pipe, item, list(texts.values()), timestep)
        for name, e, z in list(zip(texts, error, z0, strict=True))[1:]:
            change = float((z - z0[0]).square().mean().sqrt())
            rows.setdefault(name, []).append((float(error[0] < e), float(e / error[0] - 1), change))
    found = {}
    for name, values in rows.items():
        told, worse, moved = (bootstrap(column) for column in np.array(values).T)
        found[name] = (told, worse, moved)
    return found


def relations_of_images(pipe: Any, scenes: Sequence[Scene], guidance: float) -> dict[str, Interval]:
    """Return how often images have both objects, and of those how often the stated relation holds, also by its axis."""
    images = generate_captions(pipe, [replace(s, caption=changes(s)["true"]) for s in scenes], guidance, STEPS)
    both: list[float] = []
    holds: dict[str, list[float]] = {"relation": [], "left or right": [], "above or below": []}
    for item, image in zip(scenes, images, strict=True):
        assert item.relation is not None
        reading, relation = detect(image), item.relation[1]
        first, second = (o.phrase for o in item.objects)
        both.append(float(reading.has(first) and reading.has(second)))
        if both[-1]:
            axis = "left or right" if relation in RELATIONS[:2] else "above or below"
            for name in ("relation", axis):
                holds[name].append(float(reading.relation(first, relation, second)))
    return {name: bootstrap(np.asarray(values)) for name, values in ({"both": both} | holds).items() if values}


def lines(base: str, count: int, timesteps: Sequence[int], guidance: Sequence[float]) -> Iterator[str]:
    """Yield the figures of ``count`` scenes as text. Raises ValueError for a base that cannot be loaded."""
    pipe = load_pipeline(BaseConfig(name=base))
    set_scheduler(pipe, SCHEDULER)
    pipe.set_progress_bar_config(disable=True)
    scenes = first_scenes(count, is_related)
    yield "text states: accuracy of a linear probe for the relation, share of the variance"
    for axis, name in enumerate(("left or right", "above or below")):
        for place, (accuracy, share) in probe_states(pipe, axis).items():
            yield f"{name:14}  {place:22}  {accuracy:.3f}  {share:.4f}"
    yield "prediction: the true caption is better, error that the change adds, change of the predicted clean latents"
    for timestep in timesteps:
        for change, figures in use_of_relations(pipe, scenes, timestep).items():
            yield f"{timestep:5}  {change:10}  " + "  ".join(map(str, figures))
    for scale in guidance:
        found = relations_of_images(pipe, scenes, scale)
        yield f"guidance {scale:g}: " + ", ".join(f"{name} {value}" for name, value in found.items())
