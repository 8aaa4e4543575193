"""Forward guidance: mix the cross-attention of a phrase with a smooth window over its region, without gradients.

The forward form of arXiv 2304.03373. With A_uk the attention probability of cell u for token k of region r, and g_r a
window over the region that sums to 1,

    A_uk <- (1 - strength) A_uk + strength g_r(u) sum_v A_vk,

so that each token keeps its share of attention and the fraction ``strength`` of it moves into the region. Each cell's
probabilities are then normalised to a sum of 1 again.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from localctl.control.attention import Scores
from localctl.control.base import BoundControl, CallContext, check_strength
from localctl.control.regions import BoundRegionControl, BoundRegions, RegionControl
from localctl.denoisers.base import AttentionLayer
from localctl.layout import Layout

_FLOOR = 1e-6  # the smallest mixed probability, so that its logarithm is finite where strength is 1


@dataclass(frozen=True)
class ForwardGuidance(RegionControl):
    """Mix each phrase's attention map with a window over its region.

    Args:
        strength: in [0, 1]; a region's own strength multiplies it. 0 = no effect.
        start, end: active in the outer steps from start up to, not including, end (fractions of the steps); each
            region's own window applies within it.
        sites: the layers to steer, as for :class:`~localctl.control.layout_guidance.LayoutGuidance`; None = all.
        mask_resize: how regions are resized to each layer's grid.

    Raises:
        ValueError: a strength out of range, also of a region; an invalid window; when attached, sites that the denoiser
            does not have, or as for :func:`localctl.tokens.token_positions`.
    """

    strength: float = 0.8
    start: float = 0.0
    end: float = 0.2
    sites: tuple[str, ...] | None = None
    mask_resize: str = "area"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_strength("strength", self.strength)
        if not 0 <= self.strength <= 1:
            raise ValueError(f"The strength of ForwardGuidance must lie in [0, 1], not {self.strength}.")

    def bind(self, pipe: DiffusionPipeline, layouts: Sequence[Layout]) -> BoundControl:
        self.check_strengths(layouts, self.strength)
        regions = BoundRegions(pipe, layouts, self.mask_resize)
        names = regions.denoiser.choose_layers(regions.denoiser.groups if self.sites is None else self.sites)
        return _BoundForward(self, regions, names)


class _BoundForward(BoundRegionControl[ForwardGuidance]):
    def __init__(self, control: ForwardGuidance, regions: BoundRegions, layers: Sequence[str]) -> None:
        super().__init__(control, regions)
        self.layers = frozenset(layers)

    def attends(self, context: CallContext, layer: AttentionLayer) -> bool:
        return layer.cross and layer.name in self.layers and bool(self._active(context))

    def steers(self, layout: int, context: CallContext) -> bool:
        return any(self._strengths(layout, context))

    def attention_bias(
        self, context: CallContext, layer: AttentionLayer, scores: Scores, queries: slice
    ) -> Tensor | None:
        active = tuple(self._strengths(layout, context) for layout in context.guided_layouts)
        key = (layer.size, scores.keys, active)
        # (n,2,Q,K): for each cell and token, the fraction of attention that is moved, and the window
        maps = self.regions.per_row(context, key, lambda layout: self._maps(layout, context, layer, scores.keys))
        if maps is None:
            return None
        share, window = maps[:, None].unbind(dim=2)  # (n,1,Q,K)
        probabilities = scores.probabilities(slice(None), None)  # (n,H,Q,K)
        mass = probabilities.sum(dim=2, keepdim=True)  # (n,H,1,K)
        mixed = (1 - share) + share * window * mass / probabilities.clamp(min=torch.finfo(torch.float32).tiny)
        bias = mixed.clamp(min=_FLOOR).log()
        return bias[:, :, queries]

    def _strengths(self, layout: int, context: CallContext) -> tuple[float, ...]:
        return tuple(self.control.strength * one for one in self.regions.phrase_strengths(layout, context))

    def _maps(self, layout: int, context: CallContext, layer: AttentionLayer, keys: int) -> Tensor | None:
        strengths = self._strengths(layout, context)
        if not any(strengths):
            return None
        result = torch.zeros(2, layer.cells, keys)
        for index, (mask, strength) in enumerate(zip(self.regions.masks(layout, layer), strengths, strict=True)):
            window = _window(mask, layer.size)
            for token in self.regions.tokens(layout, index, keys):
                result[0, :, token], result[1, :, token] = strength, window
        return result


def _window(mask: Tensor, size: tuple[int, int]) -> Tensor:
    """Return a window (Q,) that sums to 1: the mask times a Gaussian at its centre, twice as wide as its spread."""
    rows, columns = (torch.arange(count, dtype=torch.float32) for count in size)
    grid = torch.stack(torch.meshgrid(rows, columns, indexing="ij")).flatten(1)  # (2,Q)
    weight = mask / mask.sum()
    centre = (grid * weight).sum(dim=1, keepdim=True)
    # 1 / 12 is the variance within one cell, so that a region of a single cell has a spread, too.
    spread = ((grid - centre).square() * weight).sum(dim=1, keepdim=True) + 1 / 12
    window = mask * torch.exp(-((grid - centre).square() / (2 * 4 * spread)).sum(dim=0))
    assert math.isfinite(float(window.sum()))
    return window / window.sum()
