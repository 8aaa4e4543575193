"""Preference of scenes over wrong ones with the same caption: Diffusion-DPO (arXiv 2311.12908) on rendered pairs.

The squared error alone says little of what a caption excludes: an object too many, or two colours swapped.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from localctl.micro.scenes import SIZE, SceneObject, render, scene_plan
from localctl.micro.shapes import COLORS, SHAPES
from research.micro_base.data import Job, in_blocks
from research.micro_base.loop import save_tensors

BETA = 200.0  # of the margin in squared error: pairs that are told apart by more than a hundredth count little
MISTAKES = {"twice": 0.5, "swapped": 0.25, "changed": 0.25}  # share of each


@dataclass(frozen=True)
class Preference:
    """wrong: latents (n, 4, 16, 16) of a wrong image for each cached scene. errors: squared errors (B,) of the frozen
    reference, of latents (B, 4, 16, 16) with what was sampled and text states. weight: of the loss."""

    wrong: Tensor
    errors: Callable[..., Tensor]
    weight: float

    def loss(self, right: Tensor, wrong: Tensor, reference: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
        """Return the loss and the share of pairs told apart better than by the reference.

        -log sigmoid(-beta m) 2 / beta, of the margin m = (right - wrong) - reference: squared errors (B,), and their
        difference for the reference. The factor makes its gradient that of m where m = 0. counts: bool (B,).
        """
        margin = right - wrong - reference
        total = counts.sum().clamp(min=1)
        loss = (F.softplus(BETA * margin) * counts).sum() / total * (2 / BETA)
        return self.weight * loss, (((margin < 0) & counts).sum() / total).detach()


def mistake(objects: Sequence[SceneObject], rng: np.random.Generator) -> tuple[SceneObject, ...]:
    """Return other objects than the caption's: one of them twice, the colours of two of different
    shapes swapped, or one colour or shape changed.

    A mistake that the objects leave no room for is replaced by a change.
    """
    kind, found = str(rng.choice(list(MISTAKES), p=list(MISTAKES.values()))), list(objects)
    if kind == "twice":
        twin = _twin(objects, rng)
        if twin is not None:
            return *objects, twin
    unlike = [(a.color != b.color and a.shape != b.shape) for a, b in itertools.combinations(found, 2)]
    pairs = list(itertools.compress(itertools.combinations(range(len(found)), 2), unlike))
    if kind == "swapped" and pairs:
        i, j = pairs[int(rng.integers(len(pairs)))]
        found[i], found[j] = replace(found[i], color=found[j].color), replace(found[j], color=found[i].color)
        return tuple(found)
    i = int(rng.integers(len(found)))
    if rng.random() < 0.5:
        found[i] = replace(found[i], color=_other(found[i].color, [o.color for o in objects], list(COLORS), rng))
    else:
        found[i] = replace(found[i], shape=_other(found[i].shape, [o.shape for o in objects], SHAPES, rng))
    return tuple(found)


def _other(own: str, those: Sequence[str], names: Sequence[str], rng: np.random.Generator) -> str:
    """Return another name than ``own``: that of another object in half of the cases, if there is one."""
    near = [name for name in those if name != own]
    return str(rng.choice(near if near and rng.random() < 0.5 else [name for name in names if name != own]))


def _twin(objects: Sequence[SceneObject], rng: np.random.Generator) -> SceneObject | None:
    """Return one of the objects at a free place, a little smaller; None if none is found."""
    item = objects[int(rng.integers(len(objects)))]
    for _ in range(60):
        radius = item.radius * float(rng.uniform(0.6, 1.0))
        x, y = (float(v) for v in rng.uniform(radius + 1, SIZE - radius - 1, 2))
        if all(np.hypot(x - o.center[0], y - o.center[1]) >= radius + o.radius + 2 for o in objects):
            return replace(item, center=(x, y), radius=radius)
    return None


def _render_mistakes(job: Job) -> np.ndarray:
    profile, split, start, stop = job
    images = []
    for i in range(start, stop):
        objects = mistake(scene_plan(i, profile, split).objects, np.random.default_rng([i, 1]))
        images.append(render(i, objects, profile, split))
    return np.stack(images)


@torch.no_grad()
def wrong_latents(count: int, encode: Callable[[np.ndarray], Tensor], path: Path) -> Tensor:
    """Return latents fp16 (count, 4, 16, 16) of a wrong image for each basic training scene, cached in ``path``."""
    if not path.exists():
        blocks = in_blocks(_render_mistakes, "basic", "train", count, None, "wrong images")
        save_tensors(path, {"latents": torch.cat([encode(images) for _, images in blocks])})
    # The file is a cache of this program, but the folder may be from anybody: unpickle nothing but tensors.
    return torch.load(path, weights_only=True)["latents"]
