"""The losses of a training step: negative log-likelihood of centres and sizes, given some of the boxes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from localctl.layout_predictor.model import LayoutPredictor
from localctl.seeding import generator
from research.layout_predictor.captions import Caption
from research.layout_predictor.data import targets

_SCALE = 0.1  # of the loss of relations, as a share of the image's side


@dataclass(frozen=True)
class Likelihood:
    """Mean negative log-likelihoods per object in nats, of centres and of the logarithms of sizes.

    relation: mean over the stated relations of softplus(-d / 0.1), where d is the distance of the expected centres in
    the stated direction, as a share of the image's side; the centre of a known box is its true one. count: of objects.
    """

    centre: Tensor
    size: Tensor
    relation: Tensor
    count: int

    @property
    def likelihood(self) -> Tensor:
        return self.centre + self.size


def likelihood(
    model: LayoutPredictor,
    captions: Sequence[Caption],
    known: Tensor,
    unread: tuple[Tensor, Tensor] | None = None,
    only: Tensor | None = None,
) -> Likelihood:
    """Return the likelihood of the boxes that are not ``known`` (B, N).

    only: (B, N), evaluate only these of them. unread: words to hide, as for :meth:`Encoded.without`.
    """
    text = model.encode([item.text for item in captions], [list(item.spans) for item in captions])
    text = (text if unread is None else text.without(*unread)).to(model.device)
    boxes, known = targets(captions).to(model.device), known.to(model.device)
    density = model(text, boxes, known)
    evaluated = text.objects & ~known
    if only is not None:
        evaluated = evaluated & only.to(model.device)
    centre = -density.centre_log_prob(boxes[..., :2])[evaluated]
    size = -density.size_log_prob(boxes[..., 2:])[evaluated]
    expected = (density.log_weights.exp()[..., None] * density.means).sum(dim=-2)  # (B,N,2)
    expected = torch.where(known[..., None], boxes[..., :2], expected)
    relation = relation_loss(expected, captions, known)
    return Likelihood(centre.mean(), size.mean(), relation, int(evaluated.sum()))


def relation_loss(centres: Tensor, captions: Sequence[Caption], known: Tensor) -> Tensor:
    """Return the relation loss of :class:`Likelihood` for centres (B, N, 2), without relations between known boxes."""
    rows = [
        (row, first, second, int(side in ("above", "below")), -1.0 if side in ("left", "above") else 1.0)
        for row, caption in enumerate(captions)
        for first, side, second in caption.relations
        if not bool(known[row, first] and known[row, second])
    ]
    if not rows:
        return centres.new_zeros(())
    row, first, second, axis = (torch.tensor([item[i] for item in rows], device=centres.device) for i in range(4))
    sign = torch.tensor([item[4] for item in rows], device=centres.device)
    apart = sign * (centres[row, first, axis] - centres[row, second, axis])
    return F.softplus(-apart / _SCALE).mean()


def sample_known(captions: Sequence[Caption], share: float, seed: int, step: int) -> Tensor:
    """Sample which boxes the model is given at this step, (B, N) bool; never all boxes of a sentence."""
    widest = max(len(item.spans) for item in captions)
    random = generator(seed, "known", step)
    known = torch.zeros(len(captions), widest, dtype=torch.bool)
    for row, item in zip(known, captions, strict=True):
        number = len(item.spans)
        order = torch.randperm(number, generator=random)
        given = int(torch.randint(1, number, (1,), generator=random)) if number > 1 else 0
        if float(torch.rand(1, generator=random)) < share:
            row[order[:given]] = True
    return known


def sample_unread(
    captions: Sequence[Caption], words: float, names: float, longest: int, seed: int, step: int
) -> tuple[Tensor, Tensor]:
    """Sample the words hidden at this step, (B, longest) bool, and the sentences without names of things, (B,) bool."""
    random = generator(seed, "unread", step)
    return torch.rand(len(captions), longest, generator=random) < words, torch.rand(
        len(captions), generator=random
    ) < names
