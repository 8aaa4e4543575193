"""One step of learning: the negative log-likelihood of centres and sizes, given some of the boxes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from localctl.layout_predictor.captions import Caption
from localctl.layout_predictor.data import targets
from localctl.layout_predictor.model import LayoutPredictor
from localctl.random import generator


@dataclass(frozen=True)
class Likelihood:
    """Mean negative log-likelihoods per object in nats: of centres and of the logarithms of sizes; count of objects."""

    centre: Tensor
    size: Tensor
    count: int

    @property
    def loss(self) -> Tensor:
        return self.centre + self.size


def likelihood(
    model: LayoutPredictor,
    captions: Sequence[Caption],
    known: Tensor,
    hidden: Tensor | None = None,
    only: Tensor | None = None,
) -> Likelihood:
    """The likelihood of the boxes that are not ``known`` (B, N), or of those among them that are in ``only`` (B, N).

    hidden: (B, L or more) bool, words outside objects that are not to be read.
    """
    text = model.encode([item.text for item in captions], [list(item.spans) for item in captions])
    text = (text if hidden is None else text.without(hidden)).to(model.device)
    boxes, known = targets(captions).to(model.device), known.to(model.device)
    density = model(text, boxes, known)
    asked = text.objects & ~known
    if only is not None:
        asked = asked & only.to(model.device)
    centre = -density.centre_log_prob(boxes[..., :2])[asked]
    size = -density.size_log_prob(boxes[..., 2:])[asked]
    return Likelihood(centre.mean(), size.mean(), int(asked.sum()))


def draw_known(captions: Sequence[Caption], share: float, seed: int, step: int) -> Tensor:
    """(B, N) bool: which boxes are shown at this step; never all those of a sentence."""
    widest = max(len(item.spans) for item in captions)
    draws = generator(seed, "known", step)
    known = torch.zeros(len(captions), widest, dtype=torch.bool)
    for row, item in zip(known, captions, strict=True):
        number = len(item.spans)
        order = torch.randperm(number, generator=draws)
        shown = int(torch.randint(1, number, (1,), generator=draws)) if number > 1 else 0
        if float(torch.rand(1, generator=draws)) < share:
            row[order[:shown]] = True
    return known


def draw_hidden(captions: Sequence[Caption], share: float, longest: int, seed: int, step: int) -> Tensor:
    """(B, longest) bool: which words are hidden at this step."""
    return torch.rand(len(captions), longest, generator=generator(seed, "hidden", step)) < share
