"""Texts of regions, ready to be mixed into the attention of the cells that their regions cover."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from localctl.control.attention import padded
from localctl.control.base import CallContext, Mixture, Part
from localctl.control.regions import BoundRegions
from localctl.denoisers.base import AttentionLayer


class Pair(NamedTuple):
    """A region, (layout, index), whose text is mixed into ``row`` in place of the attention of row ``base``."""

    row: int
    base: int
    region: tuple[int, int]


@dataclass(frozen=True)
class _Plan:
    """All of a :class:`Mixture` that does not depend on weights, sorted by the number of cells.

    order: (pairs,), the place of each sorted pair among the given ones. texts, hidden: as in a :class:`Mixture`, with
    ``hidden`` for its mask. masks: (pairs, Q) float32. indices: for each
    part its pairs; its cells within all rows, those of the bases, and those within ``masks``, (g * m,); and (g * m, 1),
    1 for the cells of a region, 0 for those that only fill the part up.
    """

    order: Tensor
    texts: Tensor
    hidden: Tensor | None
    rows: Tensor
    bases: Tensor
    masks: Tensor
    indices: tuple[tuple[slice, Tensor, Tensor, Tensor, Tensor], ...]


class TextMixer:
    """Makes the mixtures of one control. What depends only on the layout is moved to the device once per call."""

    def __init__(self, regions: BoundRegions) -> None:
        self.regions = regions
        self.texts: Mapping[tuple[int, int], Tensor] = {}  # (layout, region) -> (K, C)
        self._plans: dict[object, _Plan] = {}
        self._mixtures: dict[tuple[int, int], tuple[object, Tensor | None, Mixture]] = {}  # the last one, by layer.size

    def begin_call(self, texts: Mapping[tuple[int, int], Tensor]) -> None:
        """Begin a call of the pipeline with these texts."""
        self.texts, self._plans, self._mixtures = texts, {}, {}

    def mixture(
        self, context: CallContext, layer: AttentionLayer, pairs: Sequence[Pair], weights: Tensor | None, convex: bool
    ) -> Mixture:
        """Return the mixture of these pairs, each with its mask times its weight as share.

        Args:
            weights: (pairs,); None: 1. The same tensor must hold the same values.
            convex: scale the shares of a row down where they sum to more than 1.
        """
        key = (layer.size, tuple(pairs), len(context.conditional), context.device, context.dtype)
        last = self._mixtures.get(layer.size)
        if last is not None and last[0] == key and last[1] is weights:
            return last[2]
        if key not in self._plans:
            self._plans[key] = self._plan(context, layer, pairs)
        plan = self._plans[key]
        share = plan.masks
        if weights is not None:
            share = weights.to(context.device, torch.float32)[plan.order, None] * share  # (pairs,Q)
        if convex:
            total = share.new_zeros(len(context.conditional), share.shape[1]).index_add(0, plan.rows, share)
            # Not clamp, whose gradient at exactly 1 would keep an optimised weight there.
            whole = torch.where(total > 1, total, torch.ones_like(total))
            share = share / whole[plan.rows]
        flat = share.flatten()
        parts = tuple(
            Part(chosen, into, bases, flat[cells, None] * filled) for chosen, into, bases, cells, filled in plan.indices
        )
        mixture = Mixture(plan.texts, plan.rows, plan.bases, share[..., None], parts, plan.hidden)
        self._mixtures[layer.size] = (key, weights, mixture)
        return mixture

    def _plan(self, context: CallContext, layer: AttentionLayer, pairs: Sequence[Pair]) -> _Plan:
        masks = torch.stack([self.regions.masks(layout, layer)[index] for _, _, (layout, index) in pairs])  # (pairs,Q)
        counts = (masks > 0).sum(dim=1).clamp(min=1)
        order = counts.argsort(stable=True)
        counts, masks = counts[order].tolist(), masks[order]
        chosen = [pairs[index] for index in order.tolist()]
        place = context.device
        indices = []
        for part in _alike(counts):
            number = counts[part.stop - 1]  # of cells: the most of a pair
            cells = (masks[part] > 0).int().argsort(dim=1, descending=True, stable=True)[:, :number]  # (g,m)
            pair = torch.arange(part.start, part.stop)[:, None]
            rows, bases = (torch.tensor([one[column] for one in chosen[part]])[:, None] for column in (0, 1))
            found = [rows * layer.cells + cells, bases * layer.cells + cells, pair * layer.cells + cells]
            filled = (torch.arange(number)[None] < torch.tensor(counts[part])[:, None]).float()
            moved = [tensor.flatten().to(place) for tensor in found]
            indices.append((part, *moved, filled.flatten()[:, None].to(place)))
        rows, bases = (torch.tensor([one[column] for one in chosen], device=place) for column in (0, 1))
        own = [self.texts[one.region].to(place, context.dtype)[None] for one in chosen]
        texts, hidden = padded(own, [None] * len(own))
        texts = self.regions.denoiser.text_in_layers(texts)
        return _Plan(order.to(place), texts, hidden, rows, bases, masks.to(place), tuple(indices))


def _alike(counts: Sequence[int]) -> list[slice]:
    """Return consecutive parts of sorted ``counts`` within which no count is more than twice another."""
    parts, first = [], 0
    for index, count in enumerate([*counts, 2 * counts[-1] + 1]):
        if count > 2 * counts[first]:
            parts.append(slice(first, index))
            first = index
    return parts
